"""The scheduler over a decoder that only records: what runs together, in which order, and what it may touch."""

import random
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qwen2vl_trt.errors import DeadlineError, ExecutionError, LimitError
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampler import SampledTokens
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.executor import Counters
from qwen2vl_trt.runtime.scheduling.kv_cache import kv_cache_manager
from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler
from qwen2vl_trt.runtime.scheduling.sequence import block_hashes, token_keys
from tests.support.fake_decoder import FakeDecoder, FakePagedDecoder, drain, expected, sequence

KINDS = ("packed", "rows", "pages")


def make_decoder(kind, slots, capacity=768, pages=200):
    """Packed chunks over rows, neighbouring rows alone, or packed chunks over pages."""
    return (
        FakePagedDecoder(slots, pages, capacity) if kind == "pages" else FakeDecoder(slots, capacity, kind == "packed")
    )


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shapes(calls):
    return [[chunk[:3] for chunk in call.chunks] for call in calls]


def test_one_request_is_read_in_chunks_and_answered():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 8)
    one = sequence([1, 2, 3], max_tokens=4, delta=5)
    scheduler.add(one)
    assert scheduler.free_slots == 1
    drain(scheduler)
    assert one.output.token_ids == expected([1, 2, 3], 4)
    assert one.output.finish_reason == "length"
    assert shapes(decoder.calls) == [[(0, 0, 3)], [(0, 3, 1)], [(0, 4, 1)], [(0, 5, 1)]]
    assert [call.positions.flatten().tolist() for call in decoder.calls[1:]] == [[8] * 3, [9] * 3, [10] * 3]
    assert scheduler.free_slots == 2
    assert (scheduler.kept_tokens, decoder.resets) == (0, 1)  # less than a block


def test_what_is_kept_is_what_the_cache_shrinks_to():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    scheduler.add(sequence([1] * 60, max_tokens=5))  # the last token is never written: 64 are
    drain(scheduler)
    assert scheduler.kept_tokens == 64
    assert decoder.cache.trims == [64]
    assert decoder.resets == 0
    scheduler.forget()
    assert scheduler.kept_tokens == 0
    assert decoder.resets == 1


def test_without_prefix_reuse_nothing_is_kept():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 8, reuse_prefixes=False)
    scheduler.add(sequence([1] * 30))
    drain(scheduler)
    assert (scheduler.kept_tokens, decoder.resets) == (0, 1)


# Which prompts are read


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_do_not_change_answers(chunk, kind, ahead):
    scheduler = Scheduler(make_decoder(kind, 3), chunk, ahead=ahead)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4]]
    sequences = [sequence(prompt, max_tokens=6) for prompt in prompts]
    for one in sequences:
        scheduler.add(one)
    drain(scheduler)
    assert [one.output.token_ids for one in sequences] == [expected(prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_at_most_its_budget_and_answers_go_on(kind):
    """In one call where chunks are packed, else in at most four for prompts and one for answers."""
    decoder, counters = make_decoder(kind, 8), Counters()
    scheduler = Scheduler(decoder, 12, counters=counters)
    sequences = [sequence([number] * (1 + 9 * number), max_tokens=9) for number in range(1, 9)]
    for one in sequences:
        scheduler.add(one)
    most = 0
    while scheduler.busy:
        calls, read = len(decoder.calls), counters.prompt_tokens_computed
        answering = {one: len(one.output.token_ids) for one in sequences if one.sampled and not one.output.finished}
        scheduler.step()
        made = decoder.calls[calls:]
        assert counters.prompt_tokens_computed - read <= 12
        assert len(made) <= (5 if kind == "rows" else 1)
        most = max(most, sum(len(call.chunks) for call in made) - len(answering))
        assert all(len(one.output.token_ids) == length + 1 for one, length in answering.items())
    assert most > 1
    for number, one in enumerate(sequences, start=1):
        assert one.output.token_ids == expected([number] * (1 + 9 * number), 9)


@pytest.mark.parametrize("kind", KINDS)
def test_short_prompts_that_come_together_are_one_call(kind):
    decoder = make_decoder(kind, 8)
    scheduler = Scheduler(decoder, 100)
    sequences = [sequence([number] * 5, max_tokens=20) for number in range(1, 9)]
    for one in sequences[:6]:
        scheduler.add(one)
    scheduler.step()
    scheduler.step()  # at most four calls for prompts a step
    for one in (sequences[0], sequences[3]):  # their slots lie apart
        scheduler.cancel(one.output)
    late = [sequence([9 + number] * (4 + number), max_tokens=20) for number in range(4)]
    for one in late:
        scheduler.add(one)
    calls = len(decoder.calls)
    scheduler.step()
    made = decoder.calls[calls:]
    prompts = next(call for call in made if len(call.chunks) > 1)
    if kind == "rows":
        assert [len(call.chunks) for call in made[:1]] == [4]
        assert sorted(chunk.length for chunk in prompts.chunks) == [4, 5, 6, 7]
        assert len(made) == 2
        assert decoder.cache.swaps, "slots that lie apart are made neighbours"
    else:
        assert len(made) == 1
        assert sorted(chunk.length for chunk in prompts.chunks) == [1, 1, 1, 1, 4, 5, 6, 7]
    drain(scheduler)
    for one in (*sequences[1:3], *sequences[4:6], *late):
        assert one.output.token_ids == expected(one.token_ids, 20)


def test_logits_outlive_the_next_call_of_their_step():
    """A captured step writes them where the one before had them."""
    decoder = make_decoder("rows", 4)
    scheduler = Scheduler(decoder, 100)
    first, second = sequence([1, 2], max_tokens=9), sequence([3] * 40, max_tokens=9)
    scheduler.add(first)
    scheduler.step()
    scheduler.add(second)
    drain(scheduler)
    assert first.output.token_ids == expected([1, 2], 9)
    assert second.output.token_ids == expected([3] * 40, 9)


class Order:
    """Notes when the decoder is called and when tokens are read, by wrapping what a scheduler has."""

    def __init__(self, decoder, monkeypatch):
        self.log = []
        decoder.fails = lambda call: self.log.append("launch")
        read = SampledTokens.tolist
        monkeypatch.setattr(SampledTokens, "tolist", lambda tokens: (self.log.append("read"), read(tokens))[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ahead", [False, True])
def test_one_read_a_step_and_ahead_after_the_next_launch(kind, ahead, monkeypatch):
    decoder = make_decoder(kind, 2)
    order = Order(decoder, monkeypatch)
    scheduler = Scheduler(decoder, 100, ahead=ahead)
    one = sequence([1, 2, 3], max_tokens=5)
    scheduler.add(one)
    drain(scheduler)
    assert one.output.token_ids == expected([1, 2, 3], 5)
    assert order.log == (["launch", *["launch", "read"] * 4, "read"] if ahead else ["launch", "read"] * 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["eos", "stop", "cancel", "deadline"])
def test_who_ended_gets_no_token_of_the_step_ahead(kind, end):
    clock = Clock()
    decoder = make_decoder(kind, 1)
    scheduler = Scheduler(decoder, 100, ahead=True)
    answer = expected([3, 4, 5], 9)
    number = next(n for n, token in enumerate(answer) if n >= 2 and token not in answer[:n])
    stop = (chr(97 + answer[number]),) if end == "stop" else ()
    one = sequence(
        [3, 4, 5],
        params=Sampling(9, stop=stop),
        eos=[answer[number]] if end == "eos" else (),
        output=Output(deadline=5.0 if end == "deadline" else None, clock=clock),
    )
    scheduler.add(one)
    while len(one.output.token_ids) < number:
        scheduler.step()
    assert one.sampled == number + 1, "a step is under way"
    if end == "cancel":
        scheduler.cancel(one.output)
    elif end == "deadline":
        clock.now = 6.0
    scheduler.step()
    assert one.output.finished
    assert one.output.token_ids == answer[: number + (end != "cancel")]
    assert scheduler.free_slots == 1
    other = sequence([7, 7], max_tokens=6)
    scheduler.add(other)
    drain(scheduler)
    assert other.output.token_ids == expected([7, 7], 6)
    assert one.output.token_ids == answer[: number + (end != "cancel")]
    if kind == "pages":
        account_of_pages(scheduler, decoder)


def account_of_pages(scheduler, decoder):
    """Every page is free or has as many users as there are requests that hold it; none is in both."""
    cache = scheduler._cache
    users = [0] * decoder.cache.pages
    for slot, pages in enumerate(cache._pages):
        assert len(set(pages)) == len(pages)
        assert decoder.cache.block_table[slot, : len(pages)].tolist() == pages
        for page in pages:
            users[page] += 1
    assert cache._users == users
    assert set(cache._free) == {page for page in range(1, decoder.cache.pages) if not users[page]}
    assert users[0] == 0
    named = {name: page for page, name in enumerate(cache._names) if name is not None}
    assert cache._page_of == named
    assert all(cache._writers[page] is None for page in cache._free)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder, 8)
    long, short = sequence([1] * 300), sequence([2, 3, 4])
    scheduler.add(long)
    scheduler.step()
    scheduler.add(short)
    scheduler.step()
    assert len(short.output.token_ids) == 1  # its prompt was read
    assert long.cached == 8 + 5  # what the short one left
    drain(scheduler)


def test_of_those_behind_the_oldest_the_shortest_goes_first():
    scheduler = Scheduler(FakeDecoder(3), 8)
    oldest, long, short = sequence([1] * 100), sequence([2] * 100), sequence([3, 3, 3, 3])
    for one in (oldest, long, short):
        scheduler.add(one)
    scheduler.step()
    assert (oldest.cached, long.cached) == (4, 0)
    assert len(short.output.token_ids) == 1
    drain(scheduler)


def test_short_prompts_do_not_starve_a_long_one():
    scheduler = Scheduler(FakeDecoder(4), 8)
    long = sequence([1] * 100, max_tokens=1)
    scheduler.add(long)
    steps = 0
    while not long.output.finished:
        while scheduler.free_slots:
            scheduler.add(sequence([2, 3, 4, 5, 6, 7, 8, 9], max_tokens=1))
        scheduler.step()
        steps += 1
    assert steps == 25  # half of the budget at each
    drain(scheduler)


def test_prompts_are_read_in_the_order_of_arrival_where_they_are_alike_in_length():
    """A slot that is refilled again and again must not keep the others from ever starting."""
    scheduler = Scheduler(FakeDecoder(2), 4)
    quick = sequence([1], max_tokens=1)
    patient = sequence([2, 3], max_tokens=2)
    scheduler.add(quick)
    scheduler.add(patient)
    steps = 0
    while not patient.output.finished:
        scheduler.step()
        steps += 1
        assert steps < 6, "starved"
        if scheduler.free_slots:
            scheduler.add(sequence([1], max_tokens=1))
    drain(scheduler)


def test_only_the_slots_in_use_run():
    decoder = make_decoder("rows", 8)
    scheduler = Scheduler(decoder, 4)
    for _ in range(4):  # kept prefixes spread over the slots, the running ones stay together
        for number in range(3):
            scheduler.add(sequence([number + 1], max_tokens=4))
        drain(scheduler)
    assert max(len(call.chunks) for call in decoder.calls) <= 3


def test_a_full_scheduler_refuses():
    scheduler = Scheduler(FakeDecoder(1), 2)
    scheduler.add(sequence([1]))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        scheduler.add(sequence([2]))


# Prefix reuse

LONG = [1 + number % 7 for number in range(64)]
"""Four blocks of 16: what is shared is whole blocks."""


def test_a_prompt_goes_on_from_what_a_slot_kept():
    decoder = FakeDecoder(2)
    counters = Counters()
    scheduler = Scheduler(decoder, 100, counters=counters)
    first, second = sequence([*LONG, 9]), sequence([*LONG, 8, 8])
    for one in (first, second):
        scheduler.add(one)
        drain(scheduler)
    assert second.output.token_ids == expected([*LONG, 8, 8], 3)
    assert second.output.reused_tokens == 64
    assert shapes(decoder.calls)[3] == [(0, 64, 2)]
    assert decoder.cache.copies == []
    assert (counters.prompt_tokens_computed, counters.prompt_tokens_reused) == (65 + 2, 64)


def test_the_answer_is_a_prefix_too():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    first = sequence(LONG, max_tokens=20, delta=0)
    scheduler.add(first)
    drain(scheduler)
    again = sequence([*LONG, *first.output.token_ids, 5, 5])
    scheduler.add(again)
    drain(scheduler)
    assert again.output.reused_tokens == 80  # 83 are there: the last token was never written
    assert again.output.token_ids == expected([*LONG, *first.output.token_ids, 5, 5], 3)


def test_the_same_prompt_again_reads_its_last_block():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    for _ in range(3):
        one = sequence(LONG)
        scheduler.add(one)
        drain(scheduler)
        assert one.output.token_ids == expected(LONG, 3)
    assert one.output.reused_tokens == 48  # the last token's logits are wanted
    assert [call.chunks[0].length for call in decoder.calls if call.chunks[0].length > 1] == [64, 16, 16]


def test_a_prompt_copies_from_a_running_request():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 100)
    first, second = sequence([*LONG, 9], max_tokens=10), sequence([*LONG, 8], max_tokens=10)
    scheduler.add(first)
    scheduler.step()
    scheduler.add(second)
    drain(scheduler)
    assert decoder.cache.copies == [(0, 1, 64)]
    for one, last in ((first, 9), (second, 8)):
        assert one.output.token_ids == expected([*LONG, last], 10)


def test_a_slot_that_keeps_much_is_copied_not_overwritten():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    long = [*LONG, *[9] * 100]
    for prompt in (long, [*LONG, 8], long):
        one = sequence(prompt)
        scheduler.add(one)
        drain(scheduler)
        assert one.output.token_ids == expected(prompt, 3)
    assert decoder.cache.copies == [(0, 1, 64)]
    assert one.output.reused_tokens == 160


def test_the_slot_that_is_copied_from_is_not_the_one_given_up():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 300)
    long = [*LONG, *[9] * 100]
    for prompt in (long, [5] * 170, [*LONG, 8], long):  # the third gives up the second's slot, though it left last
        one = sequence(prompt)
        scheduler.add(one)
        drain(scheduler)
        assert one.output.token_ids == expected(prompt, 3)
    assert one.output.reused_tokens == 160


def test_of_idle_slots_the_one_left_longest_ago_is_given_up():
    scheduler = Scheduler(FakeDecoder(4), 300)
    reused = []
    for number in (1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 1):
        one = sequence([number] * 100)
        scheduler.add(one)
        drain(scheduler)
        reused.append(one.output.reused_tokens)
    assert reused == [0] * 6 + [96] * 4 + [0]


def test_equal_tokens_of_other_images_or_positions_are_not_shared():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 300)
    images = [bytes([number]) * 16 for number in (1, 2)]
    prompts = [[*LONG, *[31] * 132, 2] for _ in range(4)]
    one = sequence(prompts[0], media=[(31, [images[0]], [132])])
    other = sequence(prompts[1], media=[(31, [images[1]], [132])])
    shifted = sequence(prompts[2], media=[(31, [images[0]], [132])])
    shifted.keys[80:, 3] += 1
    same = sequence(prompts[3], media=[(31, [images[0]], [132])])
    reused = []
    for request in (one, other, shifted, same):
        scheduler.add(request)
        drain(scheduler)
        reused.append(request.output.reused_tokens)
    assert reused == [0, 64, 80, 192]


def test_prompts_that_come_together_are_read_once():
    decoder = FakeDecoder(4)
    counters = Counters()
    scheduler = Scheduler(decoder, 16, counters=counters)
    prompts = [[*LONG, number] for number in range(4)]
    sequences = [sequence(prompt, max_tokens=30) for prompt in prompts]
    for one in sequences:
        scheduler.add(one)
    drain(scheduler)
    assert [one.output.token_ids for one in sequences] == [expected(prompt, 30) for prompt in prompts]
    assert counters.prompt_tokens_computed == 65 + 3
    assert counters.prompt_tokens_reused == 3 * 64


def test_a_leader_that_goes_leaves_what_it_read():
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder, 16)
    leader, follower = sequence([*LONG, 1]), sequence([*LONG, 2])
    scheduler.add(leader)
    scheduler.add(follower)
    scheduler.step()
    scheduler.step()
    read = leader.cached
    assert 16 <= read < 64
    assert follower.slot is None
    scheduler.cancel(leader.output)
    drain(scheduler)
    assert follower.output.token_ids == expected([*LONG, 2], 3)
    assert follower.output.reused_tokens == read // 16 * 16


def test_kept_prefixes_survive_their_neighbours():
    """A decode step runs the free slots between running ones: what it writes there must lie behind what they keep."""
    decoder = make_decoder("rows", 3)
    scheduler = Scheduler(decoder, 100)
    outer = [sequence([1], max_tokens=60), sequence([2], max_tokens=60)]
    middle = sequence(LONG, max_tokens=1)
    for one in (outer[0], middle, outer[1]):
        scheduler.add(one)
        scheduler.step()
    assert [one.slot for one in (outer[0], outer[1])] == [0, 2]
    for _ in range(10):
        scheduler.step()
    assert decoder.calls[-1].chunks[1] == Chunk(1, 64, 1)
    again = sequence([*LONG, 4])
    scheduler.add(again)
    drain(scheduler)
    assert again.output.reused_tokens == 64
    assert again.output.token_ids == expected([*LONG, 4], 3)
    assert [one.output.token_ids for one in outer] == [expected([1], 60), expected([2], 60)]


def test_a_neighbour_that_reads_its_prompt_is_not_disturbed():
    decoder = make_decoder("rows", 3)
    scheduler = Scheduler(decoder, 4)
    first, last = sequence([1], max_tokens=60), sequence([2], max_tokens=60)
    middle = sequence([7], max_tokens=1)
    for one in (first, middle, last):
        scheduler.add(one)
    scheduler.step()
    late = sequence([*range(1, 31)], max_tokens=5)
    scheduler.add(late)
    drain(scheduler)
    assert any(len(call.chunks) == 3 and call.chunks[1] == Chunk(1, 4, 1) for call in decoder.calls)
    assert late.output.token_ids == expected([*range(1, 31)], 5)
    assert [one.output.token_ids for one in (first, last)] == [expected([1], 60), expected([2], 60)]


# Ends before the end


def test_a_cancelled_prompt_makes_room_for_the_next():
    scheduler = Scheduler(FakeDecoder(2), 2)
    long, next_one = sequence([1] * 50), sequence([2, 3], max_tokens=2)
    scheduler.add(long)
    scheduler.add(next_one)
    scheduler.step()
    scheduler.cancel(long.output)
    assert long.output.finish_reason == "cancelled"
    assert long.output.token_ids == []
    drain(scheduler)
    assert next_one.output.token_ids == expected([2, 3], 2)
    scheduler.cancel(Output())  # nobody's: nothing happens
    scheduler.cancel(next_one.output)
    assert next_one.output.finish_reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_cancelling_at_every_stage_frees_the_slot(steps):
    scheduler = Scheduler(FakeDecoder(1), 8)
    one = sequence([3] * 20, max_tokens=50)
    scheduler.add(one)
    for _ in range(steps):
        scheduler.step()
    scheduler.cancel(one.output)
    assert not scheduler.busy
    assert scheduler.free_slots == 1
    kept = list(one.output.token_ids)
    assert kept == expected([3] * 20, 50)[: max(0, steps - 2)]  # the third chunk is the last
    other = sequence([3] * 20, max_tokens=5)
    scheduler.add(other)
    drain(scheduler)
    assert other.output.token_ids == expected([3] * 20, 5)
    assert one.output.token_ids == kept


def test_a_deadline_ends_a_request_at_any_stage():
    clock = Clock()
    scheduler = Scheduler(FakeDecoder(2), 8)
    outputs = [Output(deadline=seconds, clock=clock) for seconds in (5, 5, 50)]
    answering = sequence([1, 2], max_tokens=50, output=outputs[0])
    scheduler.add(answering)
    scheduler.step()
    reading = sequence([4] * 100, output=outputs[1])
    scheduler.add(reading)
    scheduler.step()
    clock.now = 4.9
    scheduler.step()
    count = len(outputs[0].token_ids)
    clock.now = 5.0
    new = scheduler.step()
    assert [found.sequence for found in new] == [answering]  # one token more, its last
    assert outputs[0].finish_reason == "deadline"
    assert outputs[0].token_ids == expected([1, 2], 50)[: count + 1]
    with pytest.raises(DeadlineError, match="deadline of 5 s passed while the prompt was read, 5 s after submission"):
        outputs[1].text  # noqa: B018
    assert not scheduler.busy
    late = sequence([1, 2], output=outputs[2])
    scheduler.add(late)
    clock.now = 60
    scheduler.step()
    with pytest.raises(DeadlineError, match="before the prompt was read"):
        outputs[2].token_ids  # noqa: B018
    assert not scheduler.busy


def test_an_answer_that_ends_at_its_deadline_of_itself_has_its_own_reason():
    clock = Clock()
    scheduler = Scheduler(FakeDecoder(1), 8)
    one = sequence([1, 2], max_tokens=1, output=Output(deadline=1.0, clock=clock))
    scheduler.add(one)
    clock.now = 0.5
    original = one.stream.push
    one.stream.push = lambda *arguments: (setattr(clock, "now", 2.0), original(*arguments))[1]
    scheduler.step()
    assert one.output.finish_reason == "length"


# What fails


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_features_end_their_request_beside_answers(kind, budget, ahead):
    """A hidden state is the last token here; of a call that fails for all the rows are tried alone."""
    decoder = make_decoder(kind, 4)
    scheduler = Scheduler(decoder, budget, ahead=ahead)
    prompts = [[token, token + 1, 3 * token][: 1 + token % 3] * (token % 4 + 1) for token in range(1, 11)]
    answers, features = [], []
    for round_ in range(2):  # the second finds prefixes
        decoder.fails = failing(1, RuntimeError("row"), times=1)
        waiting = []
        for prompt in prompts:
            asked = sequence(prompt, params=Sampling(1))
            asked.features = "last_hidden_state"
            answered = sequence(prompt, max_tokens=6)
            features.append(asked)
            answers.append(answered)
            waiting += [asked, answered] if round_ else [answered, asked]
        while waiting or scheduler.busy:
            while waiting and scheduler.free_slots:
                scheduler.add(waiting.pop(0))
            new = scheduler.step()
            assert all(token.sequence in answers for token in new)
    for asked, answered in zip(features, answers):
        if asked.output.error is None:
            assert [each.tolist() for each in asked.output.features] == [[float(asked.token_ids[-1])]]
            assert (asked.output.token_ids, asked.output.finish_reason) == ([], "stop")
        if answered.output.error is None:
            assert answered.output.token_ids == expected(answered.token_ids, 6)
    failed = [each for each in [*features, *answers] if each.output.error is not None]
    assert len(failed) <= 2
    assert scheduler.free_slots == 4


def failing(slot, error, times=1000):
    left = [times]

    def fails(call):
        if left[0] and slot in [chunk.slot for chunk in call.chunks]:
            left[0] -= 1
            raise error

    return fails


def three(scheduler):
    sequences = [sequence([number + 1] * 10, max_tokens=8) for number in range(3)]
    for one in sequences:
        scheduler.add(one)
    return sequences


def check_survivors(sequences, failed, error, message):
    for number, one in enumerate(sequences):
        if number == failed:
            assert type(one.output.error) is error
            with pytest.raises(error, match=message):
                one.output.text  # noqa: B018
        else:
            assert one.output.token_ids == expected([number + 1] * 10, 8)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (
            RuntimeError("CUDA error: bad\n thing"),
            ExecutionError,
            r"decoder engine failed: RuntimeError: CUDA .* thing",
        ),
        (torch.OutOfMemoryError("out of memory"), ExecutionError, "OutOfMemoryError"),
        (MemoryError(), ExecutionError, "failed: MemoryError$"),
        (LimitError("too long"), LimitError, "too long"),
    ],
)
def test_a_prompt_that_fails_leaves_the_others_alone(raised, error, message):
    decoder = FakeDecoder(4)
    decoder.fails = failing(1, raised, times=2)  # with the others, and alone
    scheduler = Scheduler(decoder, 100)
    sequences = three(scheduler)
    drain(scheduler)
    check_survivors(sequences, 1, error, message)
    assert "\n" not in str(sequences[1].output.error)
    assert scheduler.free_slots == 4


def test_answers_that_fail_together_are_tried_alone():
    decoder = FakeDecoder(4)
    counters = Counters()
    scheduler = Scheduler(decoder, 100, counters=counters)
    sequences = three(scheduler)
    scheduler.step()
    decoder.fails = failing(1, RuntimeError("row"))
    drain(scheduler)
    check_survivors(sequences, 1, ExecutionError, "row")
    assert counters.decode_retries > 0
    assert len(sequences[1].output._token_ids) == 1


def test_a_step_too_large_for_memory_goes_row_by_row():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 100)
    sequences = three(scheduler)

    def fails(call):
        if len(call.chunks) > 1:
            raise torch.OutOfMemoryError("out of memory")

    decoder.fails = fails
    drain(scheduler)
    check_survivors(sequences, None, None, None)


def test_a_failed_slot_is_not_reused():
    decoder = FakeDecoder(1)
    scheduler = Scheduler(decoder, 100)
    one = sequence(LONG)
    scheduler.add(one)
    scheduler.step()
    decoder.fails = failing(0, RuntimeError("broken"))
    scheduler.step()
    assert isinstance(one.output.error, ExecutionError)
    assert scheduler.kept_tokens == 0
    decoder.fails = lambda call: None
    again = sequence(LONG)
    scheduler.add(again)
    drain(scheduler)
    assert again.output.reused_tokens == 0
    assert again.output.token_ids == expected(LONG, 3)


def test_a_copy_that_fails_spoils_no_other_prefix():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    for prompt in (LONG, [9] * 40):
        scheduler.add(sequence(prompt, max_tokens=1))
        drain(scheduler)
    running, wrong = sequence([*LONG, 1], max_tokens=30), sequence([*LONG, 2])
    scheduler.add(running)
    scheduler.step()

    def broken(source, target, length):
        decoder.cache.rows[target, : length // 2] = 0
        raise RuntimeError("copy")

    decoder.cache.copy_prefix = broken
    scheduler.add(wrong)
    scheduler.step()
    assert isinstance(wrong.output.error, ExecutionError)
    assert scheduler._free_indices == sorted(set(scheduler._free_indices))
    again = sequence([9] * 50)
    scheduler.add(again)
    drain(scheduler)
    assert again.output.token_ids == expected([9] * 50, 3)
    assert again.output.reused_tokens == 0
    assert running.output.token_ids == expected([*LONG, 1], 30)


def test_sampling_or_text_that_fails_ends_its_request():
    scheduler = Scheduler(FakeDecoder(4), 100)
    sequences = three(scheduler)

    def broken(token, reason=None):
        raise ValueError("no such token")

    sequences[2].stream.push = broken
    drain(scheduler)
    check_survivors(sequences, 2, ExecutionError, "no such token")


@pytest.mark.parametrize("after", [0, 1])
def test_logits_that_are_no_numbers_end_their_request_alone(after):
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 100)
    sequences = three(scheduler)
    for _ in range(after):
        scheduler.step()
    step = decoder.step

    def overflow(chunks, inputs_embeds, position_ids, wanted=None, hidden=False):
        made = step(chunks, inputs_embeds, position_ids, wanted, hidden)
        for row, number in enumerate(range(len(chunks)) if wanted is None else wanted):
            if decoder.cache.rows[chunks[number].slot, 0] == 2:  # the second prompt
                made.logits[row] = torch.nan
        return made

    decoder.step = overflow
    drain(scheduler)
    assert not (decoder.cache.rows[:, 0] == 2).any(), "what made it is cleared away"
    check_survivors(sequences, 1, ExecutionError, "no finite numbers")
    assert len(sequences[1].output._token_ids) == after


# What a shared buffer, a late error and a shortage of memory must not spoil


class BufferedDecoder(FakePagedDecoder):
    """Its likeliest tokens lie in one buffer, as those of captured steps do."""

    def __init__(self, slots, pages):
        super().__init__(slots, pages)
        self.greedy = torch.zeros(slots, dtype=torch.long)

    def step(self, chunks, inputs_embeds, position_ids, wanted=None, hidden=False):
        step = super().step(chunks, inputs_embeds, position_ids, wanted, hidden)
        greedy = step.logits.argmax(-1)
        self.greedy[: len(greedy)] = greedy
        return step._replace(greedy=self.greedy[: len(greedy)])


def test_rows_tried_alone_do_not_overwrite_each_others_last_token():
    decoder = BufferedDecoder(2, 40)
    scheduler = Scheduler(decoder, 512)
    shared = [number * 7 % 32 for number in range(256)]
    scheduler.add(sequence([*shared, 3], 1))
    drain(scheduler)
    scheduler.add(sequence([1, 2, 3], 1))
    answering = sequence([5, 6], 6)
    scheduler.add(answering)
    scheduler.step()
    late = sequence([*shared, 9], 5)  # in a lower slot, with one token to read
    scheduler.add(late)
    scheduler.step()
    failures = [RuntimeError("out of memory")]

    def fails(call):
        if len(call.chunks) == 2 and failures:
            raise failures.pop()

    decoder.fails = fails
    drain(scheduler)
    assert not failures
    assert answering.output.token_ids == expected([5, 6], 6)
    assert late.output.token_ids == expected([*shared, 9], 5)


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_that_cannot_be_read_end_their_requests(ahead, monkeypatch):
    """On a GPU an error of an earlier call is told by a later one that waits."""
    scheduler = Scheduler(FakeDecoder(2), 64, ahead=ahead)
    sequences = [sequence([1 + number] * 5, 6) for number in range(2)]
    for one in sequences:
        scheduler.add(one)
    scheduler.step()
    read = SampledTokens.tolist

    def broken(tokens):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(SampledTokens, "tolist", broken)
    scheduler.step()
    monkeypatch.setattr(SampledTokens, "tolist", read)
    assert all(isinstance(one.output.error, ExecutionError) for one in sequences)
    assert not scheduler.busy
    again = sequence([4] * 5, 6)
    scheduler.add(again)
    drain(scheduler)
    assert again.output.token_ids == expected([4] * 5, 6)


def test_no_one_is_admitted_while_a_prompt_waits_for_pages():
    """Their embeddings would take more of the memory that is short."""
    scheduler = Scheduler(FakePagedDecoder(8, 5), 2048)
    first, second, third = (sequence([1 + number] * 600, 4) for number in range(3))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.step()
    assert second.slot is None
    assert scheduler.free_slots == 0
    drain(scheduler)
    assert scheduler.free_slots == 8
    scheduler.add(third)
    drain(scheduler)
    assert [one.output.token_ids for one in (first, second)] == [expected([1] * 600, 4), expected([2] * 600, 4)]


def test_a_preempted_answer_that_expires_keeps_the_text_held_back():
    clock = Clock()
    scheduler = Scheduler(FakePagedDecoder(2, 4), 2048)
    params = Sampling(max_tokens=400, stop=("z" * 500,))
    old = sequence([1] * 500, params=Sampling(max_tokens=300), output=Output(clock=clock))
    scheduler.add(old)
    scheduler.step()
    clock.now = 1
    young = sequence([2] * 200, params=params, output=Output(deadline=1000, clock=clock))
    young.stream.push = lambda token, reason=None, push=young.stream.push: push(25, reason)  # "z" again and again
    scheduler.add(young)
    while not young.stream.token_ids or young.slot is not None:
        scheduler.step()
        assert not young.output.finished
    held = len(young.stream.token_ids) - len(young.output.text)
    clock.now = 2000
    scheduler.step()
    assert held > 0
    assert young.output.finish_reason == "deadline"
    assert young.output.text == "z" * len(young.output.token_ids)


def test_what_one_caller_made_in_inference_mode_serves_the_next():
    scheduler = Scheduler(FakeDecoder(2), 64)
    params = Sampling(max_tokens=4, repetition_penalty=1.05, frequency_penalty=0.5)
    with torch.inference_mode():
        scheduler.add(sequence([1, 2, 3], params=params))
        drain(scheduler)
    one = sequence([3, 4, 5], params=params)
    scheduler.add(one)
    drain(scheduler)
    assert one.output.finish_reason == "length", one.output.error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_who_is_cancelled_by_its_holder_alone_is_let_go(kind, ahead, steps):
    """As by ``Output.cancel``, without the scheduler's knowing: waiting, being read, answering."""
    scheduler = Scheduler(make_decoder(kind, 2), 8, ahead=ahead)
    one, other = sequence([3] * 20, 50), sequence([4] * 9, 6)
    scheduler.add(one)
    for _ in range(steps):
        scheduler.step()
    one.output.cancel()
    scheduler.add(other)
    drain(scheduler, 40)
    assert other.output.token_ids == expected([4] * 9, 6)
    assert one.output.finish_reason == "cancelled"
    assert scheduler.free_slots == 2


# Any mix


class AnyMix(RuleBasedStateMachine):
    """Requests with common beginnings come, run, are cancelled, expire and fail, in any order."""

    seen: ClassVar[dict[str, int]] = {}

    @initialize(
        kind=st.sampled_from(KINDS),
        ahead=st.booleans(),
        slots=st.integers(1, 5),
        pages=st.integers(4, 5),
        budget=st.integers(1, 40),
        reuse=st.booleans(),
    )
    def begin(self, kind, ahead, slots, pages, budget, reuse):
        slots = max(slots, 3) if kind == "pages" else slots
        self.kind, self.clock, self.counters = kind, Clock(), Counters()
        budget *= 9 if kind == "pages" else 1
        self.decoder = make_decoder(kind, slots, 768 if kind == "pages" else 170, pages)
        self.scheduler = Scheduler(self.decoder, budget, reuse, self.counters, ahead=ahead)
        self.budget, self.half = budget, -(-budget // 2)
        self.all, self.step_number = [], 0
        self.bounds, self.refused = {}, 0
        allocate = self.scheduler._cache.allocate

        def counted(one):
            found = allocate(one)
            self.refused += not found
            return found

        self.scheduler._cache.allocate = counted

    @precondition(lambda self: self.scheduler.free_slots)
    @rule(
        family=st.integers(1, 2),
        common=st.integers(0, 60),
        own=st.lists(st.integers(1, 30), min_size=1, max_size=60),
        max_tokens=st.integers(1, 40),
        deadline=st.none() | st.integers(1, 60),
        seed=st.integers(0, 9),
        eos=st.none() | st.integers(0, 31),
    )
    def add(self, family, common, own, max_tokens, deadline, seed, eos):
        if self.kind == "pages":
            common = (232, 488)[common % 2]  # with its own tokens about a page, or two; the answer needs one more
            max_tokens += 30
        prompt = [family * (1 + number % 5) for number in range(common)] + own
        output = Output(deadline=deadline, clock=self.clock, on_end=self.counters.record_end)
        params = Sampling(max_tokens, temperature=seed % 2, seed=seed)
        one = sequence(prompt, params=params, output=output, eos=() if eos is None else (eos,))
        self.all.append((one, prompt, eos))
        waiting = [other.prompt_length for other in self.scheduler._prompts]
        self.scheduler.add(one)
        # Steps until its prompt is read, whoever comes after it.
        bound = sum(-(-length // self.half) + 1 for length in (*waiting, len(prompt)))
        self.bounds[one] = self.step_number + bound

    @rule(steps=st.integers(1, 6))
    def run(self, steps):
        for _ in range(steps):
            calls, read = len(self.decoder.calls), self.counters.prompt_tokens_computed
            preempted = self.counters.preemptions
            answering = {one: len(one.output.token_ids) for one, *_ in self.all if one.sampled and one.slot is not None}
            self.scheduler.step()
            self.step_number += 1
            self.clock.now += 1
            assert len(self.decoder.calls) - calls <= (5 if self.kind == "rows" else 1)
            assert self.counters.prompt_tokens_computed - read <= self.budget
            if self.counters.preemptions == preempted:
                for one, length in answering.items():  # nobody pauses
                    assert len(one.output.token_ids) == length + 1 or one.unread

    @rule(data=st.data())
    def cancel(self, data):
        running = [one for one, *_ in self.all if not one.output.finished]
        if running:
            self.scheduler.cancel(data.draw(st.sampled_from(running)).output)

    @rule(data=st.data())
    def fail(self, data):
        slot = data.draw(st.integers(0, self.decoder.slots - 1))
        self.decoder.fails = failing(slot, RuntimeError("broken"))
        self.scheduler.step()
        self.step_number += 1
        self.decoder.fails = lambda call: None

    @invariant()
    def the_cache_holds_what_it_is_said_to_hold(self):
        cache = self.scheduler._cache
        held = {one.slot: (one, prompt) for one, prompt, _ in self.all if one.slot is not None}
        assert sorted(held) == [one.slot for one in cache.occupied]
        indices = [one.index for one, _ in held.values()]
        assert sorted([*indices, *self.scheduler._free_indices]) == list(range(self.decoder.slots))
        for slot, (one, prompt) in held.items():
            assert cache._sequences[slot] is one
            assert not one.output.finished
            written = [*prompt, *one.stream.token_ids][: one.cached]
            assert self._tokens(slot, one.cached) == written
        known = {}  # tokens of each block by its name
        for one, prompt, _ in self.all:
            tokens = [*prompt, *one.stream.token_ids]
            keys = token_keys(tokens, torch.arange(len(tokens)).expand(3, -1).numpy())
            for number, name in enumerate(block_hashes(keys, cache.block_size)):
                known[name] = tokens[number * cache.block_size : (number + 1) * cache.block_size]
        if self.kind == "pages":
            account_of_pages(self.scheduler, self.decoder)
            for page, name in enumerate(cache._names):
                if name is not None and cache._writers[page] is None:
                    assert self.decoder.cache.k[0][page, :, 0, 0].tolist() == known[name]
        else:
            for slot in set(range(self.decoder.slots)) - set(held):
                kept = [token for name in cache._hashes[slot] for token in known[name]]
                assert cache._kept[slot] == len(kept)
                assert self._tokens(slot, len(kept)) == kept
        for one, *_ in self.all:
            assert one.output.finished or one in self.scheduler._prompts or one.slot is not None
            if not (self.refused or self.counters.preemptions):
                assert one.output.finished or one.sampled or self.step_number <= self.bounds[one]

    def _tokens(self, slot, length):
        return self.decoder.read(Chunk(slot, 0, length)).tolist() if length else []

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        drain(self.scheduler, 5000)
        self.the_cache_holds_what_it_is_said_to_hold()
        for one, prompt, eos in self.all:
            assert one.output.finished
            if one.output.error is None:
                alone = self._alone(one, prompt, eos)
                got = one.output.token_ids
                assert got == (alone if one.output.finish_reason in ("length", "stop") else alone[: len(got)])
        found = self.counters
        assert found.finished + found.cancelled + found.expired + found.failed == len(self.all)
        assert found.generated_tokens == sum(len(one.output._token_ids) for one, *_ in self.all)
        assert found.prompt_tokens_reused == sum(one.output.reused_tokens for one, *_ in self.all)
        if not found.preemptions:
            read = [min(one.cached, one.prompt_length) - one.output.reused_tokens for one, *_ in self.all]
            assert found.prompt_tokens_computed == sum(read)
        for name, count in (("preemptions", found.preemptions), ("refused", self.refused), (self.kind, 1)):
            self.seen[name] = self.seen.get(name, 0) + count

    def _alone(self, one, prompt, eos):
        alone = sequence(prompt, params=one.params, eos=() if eos is None else (eos,))
        scheduler = Scheduler(FakeDecoder(1, capacity=768), 1000, reuse_prefixes=False)
        scheduler.add(alone)
        drain(scheduler)
        return alone.output.token_ids


def test_any_mix():
    AnyMix.seen.clear()
    run_state_machine_as_test(
        AnyMix, settings=settings(max_examples=200, stateful_step_count=30, deadline=None, derandomize=True)
    )
    assert all(AnyMix.seen[name] for name in KINDS)
    assert AnyMix.seen["preemptions"] > 0, AnyMix.seen
    assert AnyMix.seen["refused"] > 0


def test_ten_thousand_requests_leave_every_page_accounted_for():
    rng = random.Random(0)
    decoder, counters = make_decoder("pages", 32, 768, pages=25), Counters()
    scheduler = Scheduler(decoder, 2048, counters=counters, ahead=True)
    beginnings = [[rng.randrange(32) for _ in range(600)] for _ in range(12)]
    left, running, ended = 10_000, [], 0
    while left or scheduler.busy:
        while left and scheduler.free_slots:
            prompt = [*rng.choice(beginnings)[: rng.choice((0, 0, 252, 252, 256))], *rng.choices(range(32), k=3)]
            one = sequence(prompt, max_tokens=rng.choice((1, 2, 5, 8)))
            running.append((one, prompt))
            scheduler.add(one)
            left -= 1
        scheduler.step()
        if rng.random() < 0.05 and running:
            scheduler.cancel(rng.choice(running)[0].output)
        for one, prompt in running:
            if one.output.finish_reason == "length":
                assert one.output.token_ids == expected(prompt, one.params.max_tokens)
        ended += sum(one.output.finished for one, _ in running)
        running = [(one, prompt) for one, prompt in running if not one.output.finished]
    assert ended == 10_000
    assert counters.preemptions > 0
    assert counters.prompt_tokens_reused > 0
    account_of_pages(scheduler, decoder)
    assert len(scheduler._cache._free) == 24
    scheduler.forget()
    assert not scheduler._cache._page_of


class CountedDict(dict):
    """Counts its look-ups."""

    count = 0

    def __getitem__(self, key):
        CountedDict.count += 1
        return super().__getitem__(key)

    def __contains__(self, key):
        CountedDict.count += 1
        return super().__contains__(key)

    def get(self, key, default=None):
        CountedDict.count += 1
        return super().get(key, default)


@pytest.mark.parametrize("kind", ["rows", "pages"])
@pytest.mark.parametrize("slots", [64, 256])
def test_the_search_of_a_prefix_does_not_grow_with_the_slots(kind, slots, monkeypatch):
    decoder = make_decoder(kind, slots, 1280, pages=5 * slots + 1)
    manager = kv_cache_manager(decoder.cache, slots, True)
    name = "_page_of" if kind == "pages" else "_slots_of"
    setattr(manager, name, CountedDict())
    beginning = [number % 30 for number in range(1024)]
    made = [sequence([*beginning, number]) for number in range(slots + 1)]
    for one in made:
        manager.add(one)
    for one in made[:-2]:
        assert manager.allocate(one)
        one.cached = 1025
        manager.written(one)
    held = []
    if kind == "rows":
        original = manager.held
        monkeypatch.setattr(manager, "held", lambda slot: held.append(slot) or original(slot))
    CountedDict.count = 0
    assert manager.wait(made[-1]) is None
    assert CountedDict.count <= 8  # the depth by bisection, or four pages
    assert len(held) <= 1
    assert manager.allocate(made[-1])
    assert made[-1].cached == 1024
    assert len(held) <= 2
    shared_pages = 4
    assert manager.usage == pytest.approx(1 if kind == "rows" else (shared_pages + slots) / (5 * slots))
    for one in manager.occupied:
        manager.release(one)
    assert manager.usage == 0  # whatever is kept
