"""The scheduler over a decoder that only records: what runs together, in which order, and what it may touch."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qwen2vl_trt.errors import DeadlineError, ExecutionError, LimitError
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.executor import Counters
from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler
from tests.support.fake_decoder import FakeDecoder, drain, expected, sequence


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def shapes(calls):
    return [(call.first_slot, call.length, call.starts) for call in calls]


def test_one_request_is_read_in_chunks_and_answered():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 8)
    one = sequence([1, 2, 3], max_tokens=4, delta=5)
    scheduler.add(one)
    assert scheduler.free_slots == 1
    drain(scheduler)
    assert one.output.token_ids == expected([1, 2, 3], 4)
    assert one.output.finish_reason == "length"
    assert shapes(decoder.calls) == [(0, 3, [0]), (0, 1, [3]), (0, 1, [4]), (0, 1, [5])]
    assert [call.positions.flatten().tolist() for call in decoder.calls[1:]] == [[8] * 3, [9] * 3, [10] * 3]
    assert scheduler.free_slots == 2
    assert scheduler.kept_tokens == 6  # the last token was never written
    assert decoder.cache.trims == [6]
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


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_do_not_change_answers(chunk):
    scheduler = Scheduler(FakeDecoder(3), chunk)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4]]
    sequences = [sequence(prompt, max_tokens=6) for prompt in prompts]
    for one in sequences:
        scheduler.add(one)
    drain(scheduler)
    assert [one.output.token_ids for one in sequences] == [expected(prompt, 6) for prompt in prompts]


def test_a_step_reads_at_most_its_budget_and_four_chunks_and_answers_go_on():
    decoder = FakeDecoder(8)
    scheduler = Scheduler(decoder, 12)
    sequences = [sequence([number] * (1 + 9 * number), max_tokens=9) for number in range(1, 9)]
    for one in sequences:
        scheduler.add(one)
    most = 0
    while scheduler.busy:
        before = len(decoder.calls)
        answering = [one for one in sequences if one.token is not None and not one.output.finished]
        lengths = {id(one): len(one.output.token_ids) for one in answering}
        scheduler.step()
        prompts = [call for call in decoder.calls[before:] if call.rows == 1 and call.length > 1]
        assert sum(call.length for call in prompts) <= 12
        assert len(prompts) <= 4
        most = max(most, len(prompts))
        assert all(len(one.output.token_ids) == lengths[id(one)] + 1 for one in answering)
    assert most > 1
    for number, one in enumerate(sequences, start=1):
        assert one.output.token_ids == expected([number] * (1 + 9 * number), 9)


def test_a_short_prompt_does_not_wait_for_a_long_one():
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder, 8)
    long, short = sequence([1] * 300), sequence([2, 3, 4])
    scheduler.add(long)
    scheduler.step()
    scheduler.add(short)
    scheduler.step()
    assert len(short.output.token_ids) == 2  # its prompt was read and its answer went on
    assert long.cached == 8 + 5  # what the short one left
    drain(scheduler)


def test_of_those_behind_the_oldest_the_shortest_goes_first():
    scheduler = Scheduler(FakeDecoder(3), 8)
    oldest, long, short = sequence([1] * 100), sequence([2] * 100), sequence([3, 3, 3, 3])
    for one in (oldest, long, short):
        scheduler.add(one)
    scheduler.step()
    assert (oldest.cached, long.cached) == (4, 0)
    assert len(short.output.token_ids) == 2
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
    decoder = FakeDecoder(8)
    scheduler = Scheduler(decoder, 4)
    for _ in range(4):  # kept prefixes spread over the slots, the running ones stay together
        for number in range(3):
            scheduler.add(sequence([number + 1], max_tokens=4))
        drain(scheduler)
    assert max(call.rows for call in decoder.calls) <= 3


def test_a_full_scheduler_refuses():
    scheduler = Scheduler(FakeDecoder(1), 2)
    scheduler.add(sequence([1]))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        scheduler.add(sequence([2]))


# Prefix reuse

LONG = [1 + number % 7 for number in range(60)]


def test_a_prompt_goes_on_from_what_a_slot_kept():
    decoder = FakeDecoder(2)
    counters = Counters()
    scheduler = Scheduler(decoder, 100, counters=counters)
    first, second = sequence([*LONG, 9]), sequence([*LONG, 8, 8])
    for one in (first, second):
        scheduler.add(one)
        drain(scheduler)
    assert second.output.token_ids == expected([*LONG, 8, 8], 3)
    assert second.output.reused_tokens == 60
    assert shapes(decoder.calls)[3] == (0, 2, [60])
    assert decoder.cache.copies == []
    assert (counters.prompt_tokens_computed, counters.prompt_tokens_reused) == (61 + 2, 60)


def test_the_answer_is_a_prefix_too():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    first = sequence(LONG, max_tokens=20, delta=0)
    scheduler.add(first)
    drain(scheduler)
    again = sequence([*LONG, *first.output.token_ids, 5, 5])
    scheduler.add(again)
    drain(scheduler)
    assert again.output.reused_tokens == 79
    assert again.output.token_ids == expected([*LONG, *first.output.token_ids, 5, 5], 3)


def test_the_same_prompt_again_reads_its_last_token():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 100)
    for _ in range(3):
        one = sequence(LONG)
        scheduler.add(one)
        drain(scheduler)
        assert one.output.token_ids == expected(LONG, 3)
    assert one.output.reused_tokens == 59
    assert [call.length for call in decoder.calls if call.length > 1] == [60]


def test_a_prompt_copies_from_a_running_request():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 100)
    first, second = sequence([*LONG, 9], max_tokens=10), sequence([*LONG, 8], max_tokens=10)
    scheduler.add(first)
    scheduler.step()
    scheduler.add(second)
    drain(scheduler)
    assert decoder.cache.copies == [(0, 1, 60)]
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
    assert decoder.cache.copies == [(0, 1, 60)]
    assert one.output.reused_tokens == 159


def test_the_slot_that_is_copied_from_is_not_the_one_given_up():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 300)
    long = [*LONG, *[9] * 100]
    for prompt in (long, [5] * 170, [*LONG, 8], long):  # the third gives up the second's slot, though it left last
        one = sequence(prompt)
        scheduler.add(one)
        drain(scheduler)
        assert one.output.token_ids == expected(prompt, 3)
    assert one.output.reused_tokens == 159


def test_equal_tokens_of_other_images_or_positions_are_not_shared():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 300)
    images = [bytes([number]) * 16 for number in (1, 2)]
    prompts = [[*LONG, *[31] * 100, 2] for _ in range(4)]
    one = sequence(prompts[0], media=[(31, [images[0]], [100])])
    other = sequence(prompts[1], media=[(31, [images[1]], [100])])
    shifted = sequence(prompts[2], media=[(31, [images[0]], [100])])
    shifted.keys[80:, 3] += 1
    same = sequence(prompts[3], media=[(31, [images[0]], [100])])
    reused = []
    for request in (one, other, shifted, same):
        scheduler.add(request)
        drain(scheduler)
        reused.append(request.output.reused_tokens)
    assert reused == [0, 60, 80, 160]


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
    assert counters.prompt_tokens_computed == 61 + 3
    assert counters.prompt_tokens_reused == 3 * 60


def test_a_leader_that_goes_leaves_what_it_read():
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder, 16)
    leader, follower = sequence([*LONG, 1]), sequence([*LONG, 2])
    scheduler.add(leader)
    scheduler.add(follower)
    scheduler.step()
    scheduler.step()
    read = leader.cached
    assert 16 <= read < 60
    assert follower.slot is None
    scheduler.cancel(leader.output)
    drain(scheduler)
    assert follower.output.token_ids == expected([*LONG, 2], 3)
    assert follower.output.reused_tokens == read


def test_kept_prefixes_survive_their_neighbours():
    """A decode step runs the free slots between running ones: what it writes there must lie behind what they keep."""
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder, 100)
    outer = [sequence([1], max_tokens=60), sequence([2], max_tokens=60)]
    middle = sequence(LONG, max_tokens=1)
    for one in (outer[0], middle, outer[1]):
        scheduler.add(one)
        scheduler.step()
    assert [one.slot for one in (outer[0], outer[1])] == [0, 2]
    for _ in range(10):
        scheduler.step()
    assert decoder.calls[-1].starts[1] == 60
    again = sequence([*LONG, 4])
    scheduler.add(again)
    drain(scheduler)
    assert again.output.reused_tokens == 60
    assert again.output.token_ids == expected([*LONG, 4], 3)
    assert [one.output.token_ids for one in outer] == [expected([1], 60), expected([2], 60)]


def test_a_neighbour_that_reads_its_prompt_is_not_disturbed():
    decoder = FakeDecoder(3)
    scheduler = Scheduler(decoder, 4)
    first, last = sequence([1], max_tokens=60), sequence([2], max_tokens=60)
    middle = sequence([7], max_tokens=1)
    for one in (first, middle, last):
        scheduler.add(one)
    scheduler.step()
    late = sequence([*range(1, 31)], max_tokens=5)
    scheduler.add(late)
    drain(scheduler)
    assert any(call.rows == 3 and call.starts[1] == 4 for call in decoder.calls)
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
    assert kept == expected([3] * 20, 50)[: max(0, (steps - 2) * 1 + (steps >= 3))]
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


def failing(slot, error, times=1000):
    left = [times]

    def fails(call):
        if left[0] and call.first_slot <= slot < call.first_slot + call.rows:
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
    decoder.fails = failing(1, raised, times=1)
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
    assert len(sequences[1].output._token_ids) == 2


def test_a_step_too_large_for_memory_goes_row_by_row():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 100)
    sequences = three(scheduler)

    def fails(call):
        if call.rows > 1:
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

    def overflow(first_slot, inputs_embeds, position_ids, starts, hidden=False):
        made = step(first_slot, inputs_embeds, position_ids, starts, hidden)
        for row in range(len(starts)):
            if decoder.cache.rows[first_slot + row, 0] == 2:  # the second prompt
                made.logits[row] = torch.nan
        return made

    decoder.step = overflow
    drain(scheduler)
    assert not (decoder.cache.rows[:, 0] == 2).any(), "what made it is cleared away"
    check_survivors(sequences, 1, ExecutionError, "no finite numbers")
    assert len(sequences[1].output._token_ids) == after * 2  # the prompt's step decodes as well


# Any mix


class AnyMix(RuleBasedStateMachine):
    """Requests with common beginnings come, run, are cancelled, expire and fail, in any order."""

    @initialize(slots=st.integers(1, 5), budget=st.integers(1, 40), reuse=st.booleans())
    def begin(self, slots, budget, reuse):
        self.clock, self.counters = Clock(), Counters()
        self.decoder = FakeDecoder(slots, capacity=170)
        self.scheduler = Scheduler(self.decoder, budget, reuse, self.counters)
        self.budget, self.half = budget, -(-budget // 2)
        self.all, self.step_number = [], 0
        self.bounds = {}

    @precondition(lambda self: self.scheduler.free_slots)
    @rule(
        family=st.integers(1, 2),
        common=st.integers(0, 60),
        own=st.lists(st.integers(1, 30), min_size=1, max_size=60),
        max_tokens=st.integers(1, 40),
        deadline=st.none() | st.integers(1, 60),
        seed=st.integers(0, 9),
    )
    def add(self, family, common, own, max_tokens, deadline, seed):
        prompt = [family * (1 + number % 5) for number in range(common)] + own
        output = Output(deadline=deadline, clock=self.clock)
        params = Sampling(max_tokens, temperature=seed % 2, seed=seed)
        one = sequence(prompt, params=params, output=output)
        self.all.append((one, prompt))
        waiting = [len(other.inputs_embeds) for other in self.scheduler._prompts]
        self.scheduler.add(one)
        # Steps until its prompt is read, whoever comes after it.
        bound = sum(-(-length // self.half) + 1 for length in (*waiting, len(prompt)))
        self.bounds[one] = self.step_number + bound

    @rule(steps=st.integers(1, 6))
    def run(self, steps):
        for _ in range(steps):
            calls = len(self.decoder.calls)
            answering = {one: len(one.output.token_ids) for one, _ in self.all if one.slot is not None and one.token}
            self.scheduler.step()
            self.step_number += 1
            self.clock.now += 1
            made = self.decoder.calls[calls:]
            prompts, answers = made[: -1 if answering or self._answered(made) else None], made[-1:]
            assert len(made) <= 5
            assert sum(call.length for call in prompts if call.rows == 1) <= self.budget
            assert all(call.length == 1 for call in answers) or not answering
            for one, length in answering.items():  # nobody pauses
                assert len(one.output.token_ids) == length + 1

    def _answered(self, made):
        return bool(made) and made[-1].length == 1

    @rule(data=st.data())
    def cancel(self, data):
        running = [one for one, _ in self.all if not one.output.finished]
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
    def slots_are_consistent(self):
        slots = self.scheduler._slots._slots
        held = [one for one, _ in self.all if one.slot is not None]
        assert len({one.slot for one in held}) == len(held)
        for number, slot in enumerate(slots):
            row = self.decoder.cache.rows[number]
            if slot.sequence is not None:
                one = slot.sequence
                prompt = next(prompt for other, prompt in self.all if other is one)
                written = [*prompt, *one.stream.token_ids][: one.cached]
                assert one.slot == number
                assert not one.output.finished
                assert slot.kept.size == 0
                assert row[: one.cached].tolist() == written
            else:  # what it keeps is there, untouched
                assert row[: len(slot.kept)].tolist() == slot.kept[:, 0].tolist()
        for one, _ in self.all:
            assert one.output.finished or one in self.scheduler._prompts or one.slot is not None
            assert one.output.finished or one.token is not None or self.step_number <= self.bounds[one]

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        drain(self.scheduler)
        self.slots_are_consistent()
        for one, prompt in self.all:
            assert one.output.finished
            if one.output.finish_reason == "length":
                alone = self._alone(one, prompt)
                assert one.output.token_ids == alone
            elif one.output.error is None:
                assert one.output.token_ids == self._alone(one, prompt)[: len(one.output.token_ids)]
        computed, reused = self.counters.prompt_tokens_computed, self.counters.prompt_tokens_reused
        assert reused == sum(one.output.reused_tokens for one, _ in self.all)
        assert computed == sum(min(one.cached, one.prompt_length) - one.output.reused_tokens for one, _ in self.all)

    def _alone(self, one, prompt):
        alone = sequence(prompt, params=one.sampling)
        scheduler = Scheduler(FakeDecoder(1), 1000, reuse_prefixes=False)
        scheduler.add(alone)
        drain(scheduler)
        return alone.output.token_ids


AnyMix.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
test_any_mix = AnyMix.TestCase
