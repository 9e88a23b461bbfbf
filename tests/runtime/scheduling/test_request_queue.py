"""The request queue alone: a preparer that does nothing, no engine."""

from types import SimpleNamespace

import pytest

from qwen2vl_trt import Request
from qwen2vl_trt.errors import DeadlineError, LimitError, PromptError
from qwen2vl_trt.messages import Media
from qwen2vl_trt.runtime.prefetcher import Prefetcher
from qwen2vl_trt.runtime.preprocessing.sizes import MediaSize, Medium
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.request_queue import RequestQueue


class Preparer:
    """Takes two seconds. Images and videos are numbers; a prompt of "wrong" is refused, and more than 10 tokens."""

    def __init__(self, now):
        self._now = now

    def find_media(self, request, params=None):
        return Media(request.images, request.videos), None

    def load(self, found, most_tokens):
        return [Medium(MediaSize(28, 28, 28, 28, (1, 2, 2), 1)) for _ in (*found.images, *found.videos)]

    def prepare(self, request, params, output, media, matcher=None):
        self._now[0] += 2
        if request.prompt == "wrong":
            raise PromptError("this prompt is wrong")
        if 5 + params.max_tokens > 10:
            raise LimitError("too long")
        output.prompt_tokens = 5
        return SimpleNamespace(output=output, media=media)


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def queue(now):
    return RequestQueue(Preparer(now), Prefetcher(1), False, lambda: now[0])


@pytest.fixture
def add(queue, now):
    """Adds a request of so many images and videos; gives its output."""

    def add(images=0, videos=0, prompt="What?", deadline=None, max_tokens=3):
        output = Output(deadline=deadline, clock=lambda: now[0])
        queue.add(Request(prompt, [0] * images, [0] * videos), Sampling(max_tokens=max_tokens), output)
        return output

    return add


def prepared(queue):
    return [queued.sequence is not None for queued in queue]


def test_one_more_than_there_are_free_slots_is_prepared_a_call(queue, add):
    for _ in range(6):
        add()
    queue.prepare(2, 2)
    assert prepared(queue) == [True, True, True, False, False, False]
    for _ in range(3):
        queue.prepare(2, 2)
    assert prepared(queue) == [True, True, True, True, False, False]  # one for each slot beyond the free ones


def test_a_wrong_request_is_told_before_its_turn_and_holds_up_nobody(queue, add):
    first, wrong, last = add(), add(prompt="wrong"), add()
    queue.prepare(3, 3)
    assert prepared(queue) == [True, True]
    assert isinstance(wrong.error, PromptError)
    assert not first.finished
    assert last.prompt_tokens == 5


def test_an_answer_that_never_fits_is_told_before_its_turn(queue, add):
    fits, too_long = add(max_tokens=5), add(max_tokens=6)
    queue.prepare(2, 2)
    assert prepared(queue) == [True]
    assert isinstance(too_long.error, LimitError)
    assert not fits.finished


def test_preparing_is_timed(queue, add):
    output = add()
    queue.prepare(1, 1)
    assert (output.timings.preprocess, output.timings.load) == (2, 0)


@pytest.mark.parametrize("on_thread", [False, True])
def test_loading_is_timed_apart(now, on_thread):
    queue = RequestQueue(Preparer(now), Prefetcher(1), on_thread, lambda: now[0])
    output = Output(clock=lambda: now[0])
    queue.add(Request("What?", [0]), Sampling(max_tokens=3), output)
    (queued,) = queue._queue
    while queued.sequence is None:
        queue.prepare(1, 1)
    timings, loading = output.timings, queued.job.seconds
    assert timings.load == loading > 0
    assert timings.preprocess == 2 + (loading if on_thread else 0)  # this thread's seconds are the queue's clock's


@pytest.mark.parametrize(
    ("media", "free", "taken"),
    [((0, 0, 0), 2, 2), ((1, 2, 1), 3, 2), ((5, 1), 2, 1), ((2, 1, 0), 3, 3), ((1,), 0, 0)],
)
def test_a_group_fills_the_slots_or_one_engine_call(queue, add, media, free, taken):
    """An engine call takes 3 images or videos here; a request of more has a call of its own."""
    outputs = [add(videos=count) if number % 2 else add(images=count) for number, count in enumerate(media)]
    queue.prepare(4, 4)
    group = queue.next_group(free, 3, 1000)
    assert [sequence.output for sequence in group] == outputs[:taken]
    for sequence in group:
        queue.remove(sequence)
    assert len(queue) == len(media) - taken


def test_a_deadline_ends_whoever_it_is_and_no_other(queue, add, now):
    early, never, late = add(deadline=1.0), add(), add(deadline=5.0)
    queue.expire()
    assert len(queue) == 3
    now[0] = 2.0
    queue.expire()
    assert isinstance(early.error, DeadlineError)
    assert len(queue) == 2
    now[0] = 6.0
    queue.expire()
    assert isinstance(late.error, DeadlineError)
    assert not never.finished
    assert [queued.output for queued in queue] == [never]


def test_all_can_be_cancelled(queue, add):
    outputs = [add() for _ in range(3)]
    queue.cancel_all()
    assert len(queue) == 0
    assert [output.finish_reason for output in outputs] == ["cancelled"] * 3


def test_it_waits_for_no_media_where_none_are_on_their_way(queue, add):
    add()
    assert not queue.wait_for_media()
