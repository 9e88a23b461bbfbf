"""The scheduler over a decoder that only records: what runs together, in which order, and what it may touch."""

from typing import NamedTuple

import pytest
import torch

from runtime.detokenizer import AnswerStream
from runtime.request import Output
from runtime.runners import Step
from runtime.sampler import SamplingParams, SequenceSampling
from runtime.scheduler import RunningSequence, Scheduler

VOCABULARY = 32


class Call(NamedTuple):
    first_slot: int
    rows: int
    length: int
    starts: list[int]
    positions: torch.Tensor


class FakeDecoder:
    """Keeps what each slot holds and predicts (sum of the slot's tokens) mod V: garbage in a slot would show."""

    def __init__(self, slots):
        self.slots = slots
        self.calls, self.resets = [], 0
        self.rows = [[] for _ in range(slots)]

    def embed(self, token_ids):
        return torch.tensor(token_ids, dtype=torch.float32)[:, None]

    def step(self, first_slot, inputs_embeds, position_ids, starts, hidden=False):
        batch, length, _ = inputs_embeds.shape
        assert position_ids.shape == (3, batch, length)
        assert len(starts) == batch
        assert first_slot + batch <= self.slots
        logits = torch.zeros(batch, VOCABULARY)
        for row in range(batch):
            held = self.rows[first_slot + row]
            assert len(held) >= starts[row], "a gap in the slot"
            held[starts[row] :] = inputs_embeds[row, :, 0].tolist()
            logits[row, int(sum(held)) % VOCABULARY] = 1
        self.calls.append(Call(first_slot, batch, length, list(starts), position_ids))
        return Step(logits, None)

    def reset(self):
        self.resets += 1
        self.rows = [[] for _ in range(self.slots)]


class Tokenizer:
    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(97 + token % 26) for token in token_ids)


def sequence(prompt, max_tokens=3, delta=0):
    params = SamplingParams(max_tokens)
    return RunningSequence(
        output=Output(),
        inputs_embeds=torch.tensor(prompt, dtype=torch.float32)[:, None],
        position_ids=torch.arange(len(prompt)).expand(3, -1),
        delta=delta,
        stream=AnswerStream(Tokenizer(), params, ()),
        sampling=SequenceSampling(params, prompt, VOCABULARY),
    )


def expected(prompt, max_tokens):
    held = list(prompt)
    for _ in range(max_tokens):
        held.append(sum(held) % VOCABULARY)
    return held[len(prompt) :]


def drain(scheduler, limit=200):
    steps = 0
    while scheduler.busy:
        scheduler.step()
        steps += 1
        assert steps < limit
    return steps


def test_one_request():
    decoder = FakeDecoder(2)
    scheduler = Scheduler(decoder, 8)
    one = sequence([1, 2, 3], max_tokens=4, delta=5)
    scheduler.add(one)
    assert scheduler.free_slots == 1
    drain(scheduler)
    assert one.output.token_ids == expected([1, 2, 3], 4)
    assert one.output.finish_reason == "length"
    assert [(call.first_slot, call.length, call.starts) for call in decoder.calls] == [
        (0, 3, [0]),
        (0, 1, [3]),
        (0, 1, [4]),
        (0, 1, [5]),
    ]
    assert [call.positions.flatten().tolist() for call in decoder.calls[1:]] == [[8] * 3, [9] * 3, [10] * 3]
    assert decoder.resets == 1
    assert scheduler.free_slots == 2


def test_a_step_runs_at_most_one_chunk_of_one_prompt():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 6)
    sequences = [sequence([number] * (4 + 6 * number), max_tokens=9) for number in range(1, 5)]
    for one in sequences:
        scheduler.add(one)
    while scheduler.busy:
        before, running = len(decoder.calls), sum(one.token is not None for one in sequences)
        scheduler.step()
        made = decoder.calls[before:]
        prompts = made[:1] if made[0].rows == 1 and made[0].length > 1 else []
        assert len(made) - len(prompts) <= 1
        assert all(call.length <= 6 for call in prompts)
        assert all(call.length == 1 for call in made[len(prompts) :])
        if running and any(not one.output.finished for one in sequences if one.token is not None):
            assert made[-1].length == 1  # answers go on while a prompt is read
    for number, one in enumerate(sequences, start=1):
        assert one.output.token_ids == expected([number] * (4 + 6 * number), 9)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_do_not_change_answers(chunk):
    scheduler = Scheduler(FakeDecoder(3), chunk)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4]]
    sequences = [sequence(prompt, max_tokens=6) for prompt in prompts]
    for one in sequences:
        scheduler.add(one)
    drain(scheduler)
    assert [one.output.token_ids for one in sequences] == [expected(prompt, 6) for prompt in prompts]


def test_rows_between_running_ones_are_harmless():
    decoder = FakeDecoder(4)
    scheduler = Scheduler(decoder, 4)
    short, long = sequence([5], max_tokens=2), sequence([7, 8], max_tokens=12)
    first, last = sequence([1, 2], max_tokens=12), sequence([3], max_tokens=12)
    for one in (first, short, long, last):  # the second slot frees early
        scheduler.add(one)
    while not short.output.finished:
        scheduler.step()
    while not (long.token is not None and last.token is not None):
        scheduler.step()
    scheduler.cancel(long.output)  # now two free slots lie between two running ones
    before = len(decoder.calls)
    scheduler.step()
    assert [(call.first_slot, call.rows) for call in decoder.calls[before:]] == [(0, 4)]
    late = sequence(list(range(1, 11)), max_tokens=5)  # reads its prompt, chunk by chunk, in the second slot
    scheduler.add(late)
    drain(scheduler)
    assert first.output.token_ids == expected([1, 2], 12)
    assert last.output.token_ids == expected([3], 12)
    assert late.output.token_ids == expected(list(range(1, 11)), 5)


def test_only_the_slots_in_use_run():
    decoder = FakeDecoder(8)
    scheduler = Scheduler(decoder, 4)
    for number in range(3):
        scheduler.add(sequence([number + 1], max_tokens=4))
    drain(scheduler)
    assert max(call.rows for call in decoder.calls) <= 3


def test_prompts_are_read_in_the_order_of_arrival():
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


def test_a_cancelled_prompt_makes_room_for_the_next():
    scheduler = Scheduler(FakeDecoder(2), 2)
    long, next_one = sequence([1] * 50), sequence([2, 3], max_tokens=2)
    scheduler.add(long)
    scheduler.add(next_one)
    scheduler.step()
    scheduler.cancel(long.output)
    scheduler.step()
    assert next_one.output.token_ids[:1] == expected([2, 3], 1)
    drain(scheduler)
    assert long.output.token_ids == []
    scheduler.cancel(Output())  # nobody's: nothing happens


def test_a_full_scheduler_refuses():
    scheduler = Scheduler(FakeDecoder(1), 2)
    scheduler.add(sequence([1]))
    with pytest.raises(ValueError, match="None is not in list"):
        scheduler.add(sequence([2]))
