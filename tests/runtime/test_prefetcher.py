"""Media are loaded in order, on threads, and no more of them than the bounds allow."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.runtime.features.extraction import Batching, decoded_images
from qwen2vl_trt.runtime.inputs.image_listing import ImageFile
from qwen2vl_trt.runtime.prefetcher import Prefetcher
from qwen2vl_trt.runtime.preprocessing.sizes import MediaSize, Medium

PATIENCE = 60  # seconds after which a test that hangs fails


def medium(nbytes):
    return Medium(MediaSize(28, 28, 28, 28, (1, 2, 2), 1), [torch.zeros(nbytes, dtype=torch.uint8)])


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Blocked:
    """Loads that end when they are let go; how many have begun."""

    def __init__(self, nbytes=0):
        self.nbytes, self.begun, self.let_go = nbytes, 0, threading.Event()

    def __call__(self):
        self.begun += 1
        assert self.let_go.wait(PATIENCE)
        return [medium(self.nbytes)]


@pytest.fixture
def make():
    """Makes prefetchers that are closed at the end."""
    made = []

    def prefetcher(threads=4, most_bytes=1000):
        made.append(Prefetcher(threads, most_bytes))
        return made[-1]

    yield prefetcher
    for each in made:
        each.close()


@pytest.mark.parametrize(("most", "begun"), [(0, 1), (200, 2), (350, 3), (10**6, 4)])
def test_what_is_being_loaded_counts_as_its_size_says(make, most, begun):
    prefetcher, blocked = make(4, most), Blocked(10)
    jobs = [prefetcher.submit(blocked, lambda: 100) for _ in range(6)]
    wait_until(lambda: blocked.begun == begun)
    time.sleep(0.05)
    assert blocked.begun == begun
    blocked.let_go.set()
    for job in jobs:
        prefetcher.hand_over(job, job.future.result(PATIENCE))
    assert blocked.begun == 6


def test_unknown_sizes_count_as_the_largest_that_waits(make):
    prefetcher, blocked = make(3, 1000), Blocked(400)
    jobs = [prefetcher.submit(blocked, lambda: None) for _ in range(6)]
    wait_until(lambda: blocked.begun == 3)  # one a thread, as nobody knows better
    blocked.let_go.set()
    jobs[2].future.result(PATIENCE)
    time.sleep(0.05)
    assert blocked.begun == 3
    for job in jobs[:2]:
        prefetcher.drop(job)
    wait_until(lambda: blocked.begun == 4)  # 400 wait, 400 are being loaded, and no more fit


def test_the_caller_loads_what_is_not_for_a_thread_in_its_turn(make):
    prefetcher, blocked, seen = make(), Blocked(), []

    def load():
        seen.append(threading.current_thread())
        return []

    first = prefetcher.submit(blocked, lambda: 100)
    mine, last = prefetcher.submit(load, None, on_thread=False), prefetcher.submit(blocked, lambda: 0)
    wait_until(lambda: blocked.begun == 1)
    assert prefetcher.result(first) is prefetcher.result(last) is None
    assert prefetcher.result(mine) == [] == prefetcher.result(mine)
    assert seen == [threading.current_thread()]
    wait_until(lambda: blocked.begun == 2)  # it waited for its turn
    blocked.let_go.set()


def test_a_failure_is_raised_and_keeps_nobody_waiting(make):
    prefetcher = make(1, 0)

    def broken():
        raise MediaError("bad")

    jobs = [prefetcher.submit(*what) for what in ((broken, lambda: 5), (list, broken), (list, lambda: 5))]
    assert jobs[2].future.result(PATIENCE) == []
    for job in jobs[:2]:
        with pytest.raises(MediaError):
            prefetcher.result(job)


def test_dropped_jobs_do_not_begin(make):
    prefetcher, blocked = make(1), Blocked(10)
    running, waiting = (prefetcher.submit(blocked, lambda: 10) for _ in range(2))
    wait_until(lambda: blocked.begun)
    prefetcher.drop(waiting)
    prefetcher.drop(running)
    last = prefetcher.submit(blocked, lambda: 2000)
    blocked.let_go.set()
    assert last.future.result(PATIENCE)  # the whole bound is free for it
    assert blocked.begun == 2


def test_the_size_of_a_job_that_waits_is_asked_once(make):
    """It reads the header of each frame."""
    prefetcher, blocked, asked = make(2, 0), Blocked(100), []
    first = prefetcher.submit(blocked, lambda: 100)
    wait_until(lambda: blocked.begun)
    waiting = [prefetcher.submit(list, lambda number=number: asked.append(number) or 100) for number in range(3)]
    wait_until(lambda: waiting[-1].measured)
    for job in waiting:
        assert prefetcher.result(job) is None  # as every step asks
    blocked.let_go.set()
    for job in (first, *waiting):
        prefetcher.hand_over(job, job.future.result(PATIENCE))
    assert asked == [0, 1, 2]


def test_no_job_begins_because_another_is_dropped_with_it(make):
    prefetcher, blocked = make(1, 0), Blocked(100)
    jobs = [prefetcher.submit(blocked, lambda: 100) for _ in range(5)]
    wait_until(lambda: blocked.begun)
    blocked.let_go.set()
    jobs[0].future.result(PATIENCE)
    wait_until(lambda: all(job.measured for job in jobs))
    prefetcher.drop(*jobs)
    prefetcher.submit(list, lambda: 0).future.result(PATIENCE)
    assert blocked.begun == 1


def test_threads_end_with_close_whatever_is_queued():
    before = threading.active_count()
    prefetcher, blocked = Prefetcher(2, 0), Blocked(100)
    for _ in range(9):
        prefetcher.submit(blocked, lambda: 100)
    wait_until(lambda: blocked.begun)
    threading.Timer(0.05, blocked.let_go.set).start()
    prefetcher.close()
    wait_until(lambda: threading.active_count() <= before)
    assert blocked.begun == 1
    assert prefetcher.submit(lambda: [], lambda: 0).future.result(PATIENCE) == []  # it goes on
    prefetcher.close()


class Source:
    """Images without files; image 5 is bad."""

    def __init__(self, decoded=1, decoding=0, pause=0.0):
        self.loaded, self.pause, self.decoded, self.decoding = [], pause, decoded, decoding
        self.lock = threading.Lock()
        self.held = self.most = 0

    def size(self, path, name):
        return self.decoding

    def load(self, path, name):
        self.hold(self.decoding)
        time.sleep(self.pause * (int(path) % 3))  # they do not end in the order in which they began
        self.loaded.append(path)
        if path == "5":
            self.hold(-self.decoding)
            raise MediaError(f"{name}: bad")
        self.hold(self.decoded - self.decoding)
        return medium(self.decoded)

    def hold(self, nbytes):
        with self.lock:
            self.held += nbytes
            self.most = max(self.most, self.held)


def decode(source, count, batching, prefetcher):
    images = ((number, ImageFile(f"key {number}", str(number))) for number in range(count))
    return decoded_images(source, images, batching, prefetcher)


@pytest.mark.parametrize(("decoding", "decoded"), [(0, 1), (200, 200), (600, 600), (500, 100)])
def test_images_come_in_order_within_the_bytes(make, decoding, decoded):
    source = Source(decoded, decoding, pause=0.002)
    found = []
    for key, image in decode(source, 60, Batching(16, 100, 4), make(4)):
        found.append(key)
        if isinstance(image, Exception):
            assert (key, str(image)) == ("key 5", "image 5: bad")
        else:
            source.hold(-decoded)
        del image
    assert found == [f"key {number}" for number in range(60)]
    assert source.most <= 1000 + decoded  # the one that is handed over


def test_the_next_batch_is_decoded_while_nobody_asks(make):
    source = Source()
    decoded = decode(source, 100, Batching(4, 100, 2), make(2))
    for _ in range(4):  # a batch, with which the engine is busy now
        next(decoded)
    wait_until(lambda: len(source.loaded) == 4 + 7)  # one place came free with each image, the last is still ours
    time.sleep(0.02)
    assert len(source.loaded) == 11


def test_what_is_handed_over_counts_until_it_is_let_go_of(make):
    """A batch that the engine works on takes memory too; one more is decoded, as the caller may wait for it."""
    source = Source(300, 300)
    decoded = decode(source, 100, Batching(8, 100, 4), make(4))
    batch = [next(decoded) for _ in range(3)]
    wait_until(lambda: len(source.loaded) >= 4)
    time.sleep(0.05)
    assert len(source.loaded) == 4
    batch.clear()
    next(decoded)
    wait_until(lambda: len(source.loaded) > 5)
    assert len([*decoded]) == 96


def test_the_end_of_a_dropped_job_ends_a_wait(make):
    """It kept out a job that only the caller can begin, and others are behind that one."""
    prefetcher, blocked = make(1), Blocked()
    dropped = prefetcher.submit(blocked, lambda: 0)
    wait_until(lambda: blocked.begun == 1)
    mine, behind = prefetcher.submit(list, None, on_thread=False), prefetcher.submit(list, lambda: 0)
    prefetcher.drop(dropped)
    assert prefetcher.result(mine) is None
    threading.Timer(0.1, blocked.let_go.set).start()
    prefetcher.wait([mine, behind], PATIENCE, Future())
    assert prefetcher.result(mine) == []
    assert behind.future.result(PATIENCE) == []


def test_an_interrupted_load_of_the_caller_can_be_done_again(make):
    prefetcher, given = make(), [KeyboardInterrupt(), [medium(1)]]

    def load():
        found = given.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    job, last = prefetcher.submit(load, None, on_thread=False), prefetcher.submit(list, lambda: 0)
    with pytest.raises(KeyboardInterrupt):
        prefetcher.result(job)
    assert [each.nbytes for each in prefetcher.result(job)] == [1]
    assert last.future.result(PATIENCE) == []
