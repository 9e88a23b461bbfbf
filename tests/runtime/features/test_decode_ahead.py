"""Images are decoded while the engine works, in order, and no more of them than the bounds allow."""

import threading
import time

import pytest
import torch

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.features import decode_ahead as module
from qwen2vl_trt.runtime.features.decode_ahead import Batching, decode_ahead
from qwen2vl_trt.runtime.inputs.image_listing import ImageFile
from qwen2vl_trt.runtime.preprocessing.sizes import MediaSize, Medium


class Source:
    """Decodes without files; image 5 is bad."""

    def __init__(self, pixels=1, pause=0.0):
        self.loaded, self.pause, self.pixels = [], pause, pixels
        self.lock = threading.Lock()

    def load(self, path, name, admit):
        time.sleep(self.pause * (int(path) % 3))  # they do not end in the order in which they began
        with self.lock:
            self.loaded.append(path)
        if path == "5":
            raise MediaError(f"{name}: bad")
        return Medium(MediaSize(28, 28, 28, 28, (1, 2, 2), 1), [torch.zeros(self.pixels, dtype=torch.uint8)])


def images(count):
    return ((number, ImageFile(f"key {number}", str(number))) for number in range(count))


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_in_order_whatever_ends_first():
    with decode_ahead(Source(pause=0.002), images(40), Batching(4, 100, 3)) as decoded:
        found = list(decoded)
    assert [key for key, _ in found] == [f"key {number}" for number in range(40)]
    assert [key for key, image in found if isinstance(image, Exception)] == ["key 5"]
    assert str(found[5][1]) == "image 5: bad"


def test_the_next_batch_is_decoded_while_nobody_asks():
    source = Source()
    with decode_ahead(source, images(100), Batching(4, 100, 2)) as decoded:
        for _ in range(4):  # a batch, with which the engine is busy now
            next(decoded)
        wait_until(lambda: len(source.loaded) == 4 + 7)  # one place came free with each image, the last is still ours
        time.sleep(0.02)
        assert len(source.loaded) == 11


@pytest.mark.parametrize(("taken", "kept"), [(200, 200), (600, 600), (500, 100)])
def test_bytes_are_bounded(monkeypatch, taken, kept):
    """Of those that are being decoded what that takes, of those that wait their pixels."""
    monkeypatch.setattr(module, "DEFAULT_AHEAD_BYTES", 1000)

    class Counting(Source):
        held = most = 0

        def load(self, path, name, admit):
            admit(taken)
            self.add(taken)
            try:
                image = super().load(path, name, admit)
            except MediaError:
                self.add(-taken)
                raise
            self.add(kept - taken)
            return image

        def add(self, nbytes):
            with self.lock:
                self.held += nbytes
                self.most = max(self.most, self.held)

    source = Counting(kept, pause=0.002)
    with decode_ahead(source, images(60), Batching(16, 100, 4)) as decoded:
        for number, (key, _) in enumerate(decoded):
            assert key == f"key {number}"
            source.add(0 if number == 5 else -kept)
    assert number == 59
    assert taken <= source.most <= 1000 + kept  # the one that is handed over


def test_what_is_handed_over_counts_until_it_is_let_go_of(monkeypatch):
    """A batch that the engine works on takes memory too; one more is decoded, as the caller may wait for it."""
    monkeypatch.setattr(module, "DEFAULT_AHEAD_BYTES", 1000)

    class Admitted(Source):
        def load(self, path, name, admit):
            admit(300)
            return super().load(path, name, admit)

    source = Admitted(300)
    with decode_ahead(source, images(100), Batching(8, 100, 4)) as decoded:
        batch = [next(decoded) for _ in range(3)]
        wait_until(lambda: len(source.loaded) >= 4)
        time.sleep(0.05)
        assert len(source.loaded) == 4
        batch.clear()
        wait_until(lambda: len(source.loaded) > 4)
        assert len([*decoded]) == 97


def test_one_of_any_size_has_its_turn(monkeypatch):
    monkeypatch.setattr(module, "DEFAULT_AHEAD_BYTES", 1000)
    alone = []

    class Huge(Source):
        def load(self, path, name, admit):
            admit(10**9 if path in ("3", "5", "6") else 300)
            if path in ("3", "6"):
                alone.append(len(self.loaded))
            return super().load(path, name, admit)

    with decode_ahead(Huge(300), images(12), Batching(4, 100, 4)) as decoded:
        assert [key for key, _ in decoded] == [f"key {number}" for number in range(12)]
    assert alone == [3, 6]  # all before them have been decoded, and handed over; none behind them has begun


def test_what_was_not_asked_for_is_not_decoded():
    source = Source(pause=0.01)
    with decode_ahead(source, images(1000), Batching(100, 100, 1)) as decoded:
        for _ in range(3):
            next(decoded)
    assert len(source.loaded) < 20
