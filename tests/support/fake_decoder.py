"""A decoder that keeps plain numbers in its slots, so that a test sees what was written where, and what was lost."""

from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models

from qwen2vl_trt.runtime.backends.runners import Step
from qwen2vl_trt.runtime.detokenizer import AnswerStream
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.sequence import RunningSequence, token_keys

VOCABULARY = 32


class Call(NamedTuple):
    first_slot: int
    rows: int
    length: int
    starts: list[int]
    positions: torch.Tensor


class FakeCache:
    """Rows of numbers; -1 where nothing was ever written."""

    def __init__(self, slots, capacity):
        self.rows = np.full((slots, capacity), -1.0)
        self.copies, self.trims = [], []
        self.owner = None
        self.nbytes = self.rows.nbytes

    def copy_prefix(self, source, target, length):
        self.copies.append((source, target, length))
        self.rows[target, :length] = self.rows[source, :length]

    def clear(self, slot):
        self.rows[slot] = 0

    def trim(self, length):
        self.trims.append(length)


class FakeDecoder:
    """Writes the embeddings into its rows and predicts (sum of a row's tokens) mod V: a wrong cache shows."""

    def __init__(self, slots, capacity=400):
        self.slots, self.capacity = slots, capacity
        self.cache = FakeCache(slots, capacity)
        self.calls, self.resets = [], 0
        self.fails = lambda call: None  # raises what the engine is to raise

    def embed(self, token_ids):
        return torch.tensor(token_ids, dtype=torch.float32)[:, None]

    def step(self, first_slot, inputs_embeds, position_ids, starts, hidden=False):
        batch, length, _ = inputs_embeds.shape
        assert position_ids.shape == (3, batch, length)
        assert len(starts) == batch
        assert first_slot >= 0
        assert first_slot + batch <= self.slots
        assert max(starts) + length <= self.capacity
        call = Call(first_slot, batch, length, list(starts), position_ids)
        self.fails(call)
        logits = torch.zeros(batch, VOCABULARY)
        for row, start in enumerate(starts):
            held = self.cache.rows[first_slot + row]
            held[start : start + length] = inputs_embeds[row, :, 0].numpy()
            logits[row, int(held[: start + length].sum()) % VOCABULARY] = 1
        self.calls.append(call)
        return Step(logits, None)

    def reset(self):
        self.resets += 1
        self.cache.rows[:] = -1


TOKENIZER = Tokenizer(models.WordLevel({chr(97 + token): token for token in range(VOCABULARY)}, unk_token="a"))
TOKENIZER.decoder = decoders.Fuse()


def sequence(prompt, max_tokens=3, delta=0, media=(), output=None, params=None):
    """A request; ``media`` as of :func:`qwen2vl_trt.runtime.scheduling.sequence.token_keys`."""
    params = params or Sampling(max_tokens)
    positions = torch.arange(len(prompt)).expand(3, -1)
    return RunningSequence(
        output=output or Output(),
        token_ids=list(prompt),
        text="",
        position_ids=positions,
        delta=delta,
        media=[],
        places=np.empty(0, np.int64),
        inputs_embeds=torch.tensor(prompt, dtype=torch.float32)[:, None],
        stream=AnswerStream(TOKENIZER, params, ()),
        sampling=params,
        keys=token_keys(prompt, positions.numpy(), media),
    )


def expected(prompt, max_tokens):
    """The answer of :func:`sequence` where nothing disturbs it."""
    held = list(prompt)
    for _ in range(max_tokens):
        held.append(sum(held) % VOCABULARY)
    return held[len(prompt) :]


def drain(scheduler, limit=500):
    steps = 0
    while scheduler.busy:
        scheduler.step()
        steps += 1
        assert steps < limit
    return steps
