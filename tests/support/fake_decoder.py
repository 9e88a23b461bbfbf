"""A decoder that keeps plain numbers in its slots, so that a test sees what was written where, and what was lost."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from qwen2vl_trt.runtime.backends.paged_cache import PAGE, PagedKVCache
from qwen2vl_trt.runtime.backends.steps import Chunk, Step
from qwen2vl_trt.runtime.detokenizer import AnswerStream
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.sequence import RunningSequence, token_keys

VOCABULARY = 32
CONFIG = SimpleNamespace(num_key_value_heads=1, head_dim=1, num_hidden_layers=1, hidden_size=1)


class Call(NamedTuple):
    chunks: list[Chunk]
    positions: torch.Tensor


class FakeCache:
    """Rows of numbers; -1 where nothing was ever written."""

    def __init__(self, slots, capacity):
        self.rows = np.full((slots, capacity), -1.0)
        self.copies, self.trims, self.swaps = [], [], []
        self.owner = None
        self.max_seq_len = capacity
        self.nbytes = self.rows.nbytes

    def copy_prefix(self, source, target, length):
        self.copies.append((source, target, length))
        self.rows[target, :length] = self.rows[source, :length]

    def swap(self, one, other, length):
        self.swaps.append((one, other, length))
        self.rows[[one, other], :length] = self.rows[[other, one], :length]

    def clear(self, slot):
        self.rows[slot] = 0

    def trim(self, length):
        self.trims.append(length)


class FakeDecoder:
    """Writes the embeddings into its rows and predicts (sum of a row's tokens) mod V: a wrong cache shows.

    A call that no engine would take fails the test, whatever the scheduler catches, and a step overwrites the logits
    and the hidden states, which are the embeddings, of the one before.
    """

    vocab_size, enqueues = VOCABULARY, True

    def __init__(self, slots, capacity=400, packed=True):
        self.slots, self.capacity, self.packed = slots, capacity, packed
        self.cache = FakeCache(slots, capacity)
        self.calls, self.resets = [], 0
        self.fails = lambda call: None  # raises what the engine is to raise
        self._logits = self._states = torch.empty(0)

    def embed(self, token_ids):
        return torch.as_tensor(token_ids, dtype=torch.float32)[:, None]

    def step(self, chunks, inputs_embeds, position_ids, wanted=None, hidden=False):
        lengths = [chunk.length for chunk in chunks]
        slots = [chunk.slot for chunk in chunks]
        longest = 0 if self.packed else max(lengths)
        for right in (
            min(lengths) > 0,
            inputs_embeds.shape == (sum(lengths), 1),
            position_ids.shape == (3, sum(lengths)),
            len(set(slots)) == len(slots),
            set(slots) <= set(range(self.slots)),
            self.packed or slots == list(range(slots[0], slots[0] + len(slots))),
            max(chunk.start + max(chunk.length, longest) for chunk in chunks) <= self.capacity,
        ):
            if not right:
                pytest.fail(f"no engine takes {chunks}, {inputs_embeds.shape}, {position_ids.shape}")
        call = Call(list(chunks), position_ids)
        self.fails(call)
        self._logits.fill_(torch.nan)
        self._states.fill_(torch.nan)
        logits = torch.zeros(len(chunks), VOCABULARY)
        for row, (chunk, embeds) in enumerate(zip(chunks, inputs_embeds.split(lengths))):
            self.write(chunk, embeds[:, 0], max(longest, chunk.length))
            logits[row, int(self.read(chunk).sum()) % VOCABULARY] = 1
        self.calls.append(call)
        self._logits = logits if wanted is None else logits[list(wanted)]
        self._states = inputs_embeds.clone()
        return Step(self._logits, self._states if hidden else None)

    def write(self, chunk, tokens, padded):
        row = self.cache.rows[chunk.slot]
        row[chunk.start : chunk.start + padded] = 17  # of padding
        row[chunk.start : chunk.end] = tokens.numpy()

    def read(self, chunk):
        return self.cache.rows[chunk.slot, : chunk.end]

    def reset(self):
        self.resets += 1
        self.cache.rows[:] = -1


class FakePagedDecoder(FakeDecoder):
    """The same over pages."""

    def __init__(self, slots, pages, capacity=400 * 16):
        super().__init__(slots, capacity)
        self.cache = PagedKVCache(CONFIG, slots, capacity, pages, torch.float64, "cpu")
        self.cache.k = [torch.full((pages, PAGE, 1, 1), -1.0, dtype=torch.float64)]

    def write(self, chunk, tokens, padded):
        self.cache.k[0].flatten(0, 1)[self.cache.slot_mapping([chunk]), 0, 0] = tokens.double()

    def read(self, chunk):
        places = self.cache.slot_mapping([Chunk(chunk.slot, 0, chunk.end)])
        if min(places) < PAGE:
            pytest.fail("page 0 belongs to nobody")
        return self.cache.k[0].flatten(0, 1)[places, 0, 0]

    def reset(self):
        self.resets += 1


TOKENIZER = Tokenizer(models.WordLevel({chr(97 + token): token for token in range(VOCABULARY)}, unk_token="a"))
TOKENIZER.decoder = decoders.Fuse()


def sequence(prompt, max_tokens=3, delta=0, media=(), output=None, params=None, eos=()):
    """A request; ``media`` as of :func:`qwen2vl_trt.runtime.scheduling.sequence.token_keys`."""
    params = params or Sampling(max_tokens)
    positions = torch.arange(len(prompt)).expand(3, -1)
    output = output or Output()
    output.prompt_tokens = len(prompt)
    return RunningSequence(
        output=output,
        token_ids=list(prompt),
        text="",
        position_ids=positions,
        delta=delta,
        media=[],
        places=np.empty(0, np.int64),
        inputs_embeds=torch.tensor(prompt, dtype=torch.float32)[:, None],
        stream=AnswerStream(TOKENIZER, params, eos),
        params=params,
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
