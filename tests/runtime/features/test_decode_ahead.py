"""Images are decoded while the engine works, in order, and no more of them than the bounds allow."""

import threading
import time

import pytest
import torch

from qwen2vl_trt.errors import MediaError
from runtime.features import decode_ahead as module
from runtime.features.decode_ahead import Batching, decode_ahead
from runtime.inputs.image_listing import ImageFile
from runtime.media.embedder import LoadedImage


class Source:
    """Decodes without files; image 5 is bad."""

    def __init__(self, pixels=1, pause=0.0):
        self.loaded, self.pause = [], pause
        self.image = LoadedImage(torch.zeros(pixels, dtype=torch.uint8), (1, 2, 2))
        self.lock = threading.Lock()

    def load(self, path, name, admit):
        time.sleep(self.pause * (int(path) % 3))  # they do not end in the order in which they began
        with self.lock:
            self.loaded.append(path)
        if path == "5":
            raise MediaError(f"{name}: bad")
        return self.image


def images(count):
    return ((number, ImageFile(f"key {number}", str(number))) for number in range(count))


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_in_order_whatever_ends_first():
    with decode_ahead(Source(pause=0.002), images(40), Batching(4, 100, 4, 3)) as decoded:
        found = list(decoded)
    assert [key for key, _ in found] == [f"key {number}" for number in range(40)]
    assert [key for key, image in found if isinstance(image, Exception)] == ["key 5"]
    assert str(found[5][1]) == "image 5: bad"


def test_the_next_batch_is_decoded_while_nobody_asks():
    source = Source()
    with decode_ahead(source, images(100), Batching(4, 100, 4, 2)) as decoded:
        for _ in range(4):  # a batch, with which the engine is busy now
            next(decoded)
        wait_until(lambda: len(source.loaded) == 4 + 7)  # one place came free with each image, the last is still ours
        time.sleep(0.02)
        assert len(source.loaded) == 11


@pytest.mark.parametrize("pixels", [200, 600])
def test_waiting_pixels_are_bounded(monkeypatch, pixels):
    monkeypatch.setattr(module, "DEFAULT_AHEAD_BYTES", 1000)
    source = Source(pixels)
    with decode_ahead(source, images(60), Batching(16, 100, 4, 1)) as decoded:
        next(decoded)
        time.sleep(0.02)
        assert len(source.loaded) <= 2  # while no image's size is known, one a thread
        for _ in range(29):
            next(decoded)
        time.sleep(0.05)
        settled = len(source.loaded)
        for number in range(30, 50):
            next(decoded)
            wait_until(lambda: len(source.loaded) > number)  # noqa: B023
            time.sleep(0.002)
            assert len(source.loaded) - (number + 1) <= 1000 // pixels
    assert settled < 60


def test_what_was_not_asked_for_is_not_decoded():
    source = Source(pause=0.01)
    with decode_ahead(source, images(1000), Batching(100, 100, 4, 1)) as decoded:
        for _ in range(3):
            next(decoded)
    assert len(source.loaded) < 20
