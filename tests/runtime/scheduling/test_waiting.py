"""The line of waiting requests alone: a preparer that does nothing, no engine."""

from types import SimpleNamespace

import pytest

from qwen2vl_trt import Request
from qwen2vl_trt.errors import DeadlineError, LimitError, PromptError
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.media_ahead import MediaAhead
from qwen2vl_trt.runtime.scheduling.waiting import WaitingLine


class Preparer:
    """Takes two seconds. Images and videos are numbers; a prompt of "wrong" is refused, and more than 10 tokens."""

    def __init__(self, now):
        self._now = now

    def sources(self, request, params=None):
        return SimpleNamespace(images=request.images, videos=request.videos)

    def prepare(self, request, media):
        self._now[0] += 2
        if request.prompt == "wrong":
            raise PromptError("this prompt is wrong")
        media = [SimpleNamespace(size=n, is_video=False, note=None) for n in (*media.images, *media.videos)]
        return SimpleNamespace(token_ids=[0] * 5, media=media, nbytes=0)

    def fit_answer(self, prompt_tokens, params):
        if prompt_tokens + params.max_tokens > 10:
            raise LimitError("too long")
        return params


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def line(now):
    return WaitingLine(Preparer(now), MediaAhead(lambda sources: sources, overlap=False), lambda: now[0])


@pytest.fixture
def add(line, now):
    """Adds a request of so many images and videos; gives its output."""

    def add(images=0, videos=0, prompt="What?", deadline=None, max_tokens=3):
        output = Output(deadline=deadline, clock=lambda: now[0])
        line.add(Request(prompt, [0] * images, [0] * videos), Sampling(max_tokens=max_tokens), output)
        return output

    return add


def prepared(line):
    return [waiting.prepared is not None for waiting in line]


def test_one_more_than_there_are_free_slots_is_prepared_a_call(line, add):
    for _ in range(6):
        add()
    line.prepare(2, 2)
    assert prepared(line) == [True, True, True, False, False, False]
    for _ in range(3):
        line.prepare(2, 2)
    assert prepared(line) == [True, True, True, True, False, False]  # one for each slot beyond the free ones


def test_a_wrong_request_is_told_before_its_turn_and_holds_up_nobody(line, add):
    first, wrong, last = add(), add(prompt="wrong"), add()
    line.prepare(3, 3)
    assert prepared(line) == [True, True]
    assert isinstance(wrong.error, PromptError)
    assert not first.finished
    assert last.prompt_tokens == 5


def test_an_answer_that_never_fits_is_told_before_its_turn(line, add):
    fits, too_long = add(max_tokens=5), add(max_tokens=6)
    line.prepare(2, 2)
    assert prepared(line) == [True]
    assert isinstance(too_long.error, LimitError)
    assert not fits.finished


def test_preparing_is_timed(line, add):
    output = add()
    line.prepare(1, 1)
    assert output.timings.preprocess == 2


@pytest.mark.parametrize(
    ("media", "free", "taken"),
    [((0, 0, 0), 2, 2), ((1, 2, 1), 3, 2), ((5, 1), 2, 1), ((2, 1, 0), 3, 3), ((1,), 0, 0)],
)
def test_a_group_fills_the_slots_or_one_engine_call(line, add, media, free, taken):
    """An engine call takes 3 images or videos here; a request of more has a call of its own."""
    outputs = [add(videos=count) if number % 2 else add(images=count) for number, count in enumerate(media)]
    line.prepare(4, 4)
    group = line.next_group(free, 3)
    assert [waiting.output for waiting, _ in group] == outputs[:taken]
    for waiting, _ in group:
        line.remove(waiting)
    assert len(line) == len(media) - taken


def test_a_deadline_ends_whoever_it_is_and_no_other(line, add, now):
    early, never, late = add(deadline=1.0), add(), add(deadline=5.0)
    line.expire()
    assert len(line) == 3
    now[0] = 2.0
    line.expire()
    assert isinstance(early.error, DeadlineError)
    assert len(line) == 2
    now[0] = 6.0
    line.expire()
    assert isinstance(late.error, DeadlineError)
    assert not never.finished
    assert [waiting.output for waiting in line] == [never]


def test_all_can_be_cancelled(line, add):
    outputs = [add() for _ in range(3)]
    line.cancel_all()
    assert len(line) == 0
    assert [output.finish_reason for output in outputs] == ["cancelled"] * 3


def test_it_waits_for_no_media_where_none_are_on_their_way(line, add):
    add()
    assert not line.wait_for_media()
