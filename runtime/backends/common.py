"""What the runners share: key-value cache of rows, token embeddings, decoder inputs, shapes of captured CUDA graphs.

A CUDA graph is captured for fixed shapes and addresses. So a decode step over neighbouring rows runs the first
1, 2, 4, ... of them, which takes few graphs. A row that only pads the batch writes behind its own tokens, which
:mod:`qwen2vl_trt.runtime.scheduling.scheduler` allows, and attends to one token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import EngineError, LimitError
from qwen2vl_trt.transfer import to_device
from qwen2vl_trt.weights import EMBEDDING, checkpoint_names

from .steps import Chunk, Step

_MIN_LENGTH = 128

cached_layouts = lru_cache(maxsize=64)
"""Decorates what puts a layout's index tensors on a device: they depend on image sizes alone, which repeat."""


class KVCache:
    """``k`` and ``v`` of every layer, each ``[slots, Hkv, capacity, D]``; a slot is one contiguous row.

    The capacity grows with use, in powers of two up to ``max_seq_len``: ONNX Runtime attends over all of it, however
    short the sequences. With ``fixed`` it is always ``max_seq_len``, as TensorRT and CUDA graphs require.

    Attributes:
        owner: the scheduler that wrote last. Another scheduler must not reuse its tokens.
        lengths: positions of each slot that a step has written; what fills a captured batch up writes behind them.
        allocations: how often memory was taken; with each, the tensors are others.
    """

    owner: object = None

    def __init__(
        self,
        config: TextConfig,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        fixed: bool = False,
    ) -> None:
        self.slots, self.max_seq_len, self.lengths, self.allocations = slots, max_seq_len, [0] * slots, 0
        self._min_capacity = max_seq_len if fixed else min(_MIN_LENGTH, max_seq_len)
        self._config, self._dtype, self._device = config, dtype, device
        try:
            self.k, self.v = self._allocate(self._min_capacity)
        except RuntimeError as error:  # of a CPU it says so in words alone
            heads = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            size = 2 * heads * slots * self._min_capacity * dtype.itemsize
            raise EngineError(
                f"the key-value cache of {slots:,} requests of {self._min_capacity:,} tokens takes"
                f" {size / 2**30:.1f} GiB, which cannot be had. Build with a smaller --max-num-seqs, or free memory."
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache now."""
        return sum(cache.nbytes for cache in (*self.k, *self.v))

    @property
    def capacity(self) -> int:
        """M, positions of a slot now."""
        return self.k[0].shape[2]

    def reserve(self, length: int) -> None:
        """Grow to at least ``length`` positions a slot; contents stay. Raises LimitError above ``max_seq_len``."""
        if length > self.max_seq_len:
            raise LimitError(f"{length:,} tokens do not fit the cache of {self.max_seq_len:,} (--max-seq-len)")
        if length > self.capacity:
            self._resize(self._bucket(length))

    def allot(self, count: int, length: int) -> None:
        """Give the first ``count`` slots positions for ``length`` tokens, without a scheduler."""
        self.reserve(length)

    def trim(self, length: int) -> None:
        """Shrink to what slots of ``length`` positions need; no slot in use may be longer."""
        if self._bucket(length) < self.capacity:
            self._resize(self._bucket(length))

    def reset(self) -> None:
        """Shrink to the smallest size; no slot may be in use."""
        self.trim(0)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of slot ``source`` to slot ``target``."""
        for cache in (*self.k, *self.v):
            cache[target, :, :length] = cache[source, :, :length]
        self.lengths[target] = length

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two slots."""
        for cache in (*self.k, *self.v):
            held = cache[one, :, :length].clone()
            cache[one, :, :length] = cache[other, :, :length]
            cache[other, :, :length] = held
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN: a masked key still enters the arithmetic, and NaN times zero is NaN."""
        for cache in (*self.k, *self.v):
            cache[slot].zero_()

    def rows(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Contiguous views ``[count, Hkv, capacity, D]`` of neighbouring slots."""
        return [k[first : first + count] for k in self.k], [v[first : first + count] for v in self.v]

    def _bucket(self, length: int) -> int:
        return min(self.max_seq_len, max(self._min_capacity, power_of_two(max(length, 1))))

    def _resize(self, capacity: int) -> None:
        k, v = self._allocate(capacity)  # before the old ones are released: out of memory leaves them intact
        used = min(capacity, self.capacity)
        for before, after in zip((*self.k, *self.v), (*k, *v)):
            after[:, :, :used] = before[:, :, :used]
        self.k, self.v = k, v

    def _allocate(self, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        shape = (self.slots, self._config.num_key_value_heads, capacity, self._config.head_dim)
        layers = range(self._config.num_hidden_layers)
        # Zeros, not empty, for the reason that `clear` gives.
        k, v = ([torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in layers] for _ in ("k", "v"))
        self.allocations += 1
        return k, v


class TokenEmbedding:
    """Embeds text tokens outside the decoder engine, which takes embeddings of text and images alike.

    On a CPU the table stays mapped to its file, in its own type; a lookup reads a few rows.

    Args:
        table: ``[V, C]``, where the decoder already has it on the device.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, table: Tensor | None = None
    ) -> None:
        self._table = checkpoint.load(checkpoint_names(checkpoint)[EMBEDDING]) if table is None else table
        self._dtype = dtype
        if device.type != "cpu":
            self._table = self._table.to(device, dtype)

    def __call__(self, token_ids: list[int] | Tensor) -> Tensor:
        """n token ids to ``[n, C]``."""
        return F.embedding(to_device(token_ids, self._table.device), self._table).to(self._dtype)


class Places(NamedTuple):
    """Of T new tokens: their ``slots [T]`` and ``positions [T]`` in those."""

    slots: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Places:
        """In the order of the chunks."""
        slots, starts, lengths = np.array([chunk[:3] for chunk in chunks]).T
        before = np.cumsum(lengths) - lengths
        return cls(slots.repeat(lengths), np.arange(lengths.sum()) + (starts - before).repeat(lengths))


def graph_inputs(chunks: Sequence[Chunk], inputs_embeds: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """The decoder graph's inputs without the caches, see :meth:`~.runners.DecoderRunner.step`.

    Every chunk is a row, padded on the right to the longest; what padding writes lies behind the row's tokens.
    """
    lengths = [chunk.length for chunk in chunks]
    longest, starts = max(lengths), torch.tensor([chunk.start for chunk in chunks])
    if min(lengths) == longest:
        rows = inputs_embeds.view(len(chunks), longest, -1)
        positions = position_ids.reshape(3, len(chunks), longest)
    else:
        rows = pad_sequence(inputs_embeds.split(lengths), batch_first=True)
        positions = pad_sequence(position_ids.T.split(lengths), batch_first=True).permute(2, 0, 1)
    return {
        "inputs_embeds": rows,
        "position_ids": positions,
        "cache_start": starts,
        "kv_lengths": starts + longest,
        "last_token": torch.tensor(lengths) - 1,
    }


def graph_step(chunks: Sequence[Chunk], wanted: Sequence[int] | None, logits: Tensor, states: Tensor | None) -> Step:
    """A step from the graph's outputs ``[B, V]`` and ``[B, S, C]``."""
    if states is not None:
        states = torch.cat([row[: chunk.length] for row, chunk in zip(states, chunks)])
    if wanted is not None:
        logits = logits[to_device(wanted, logits.device, torch.long)]
    return Step(logits, states)


def power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def padded_batch(rows: int, slots: int) -> int:
    """Slots that the graph for the first ``rows`` slots runs over: a power of two, or all."""
    return min(power_of_two(rows), slots)


def graph_batches(slots: int) -> list[int]:
    """Every :func:`padded_batch`, ascending."""
    return sorted({padded_batch(rows, slots) for rows in range(1, slots + 1)})


def padded_step(
    first: int, starts: Sequence[int], slot_lengths: Sequence[int], batch: int, capacity: int
) -> tuple[list[int], list[int]] | None:
    """``cache_start`` and ``kv_lengths`` of the first ``batch`` slots.

    The step's slots begin at ``first`` and hold ``starts`` tokens; ``slot_lengths`` are those of every slot.

    Returns:
        None if a padding slot is full: it has no position that may be written.
    """
    last = first + len(starts)
    if any(slot_lengths[row] >= capacity for row in (*range(first), *range(last, batch))):
        return None
    cache_start, kv_lengths = list(slot_lengths[:batch]), [1] * batch
    cache_start[first:last] = starts
    kv_lengths[first:last] = [start + 1 for start in starts]
    return cache_start, kv_lengths


_clock = time.perf_counter if os.name == "nt" else time.thread_time
"""Windows counts a thread's time in steps of 16 ms."""


@torch.no_grad()
def shortest_seconds(run: Callable[[], object]) -> float:
    """What a function takes on a CPU: the shortest of three times, after one that prepares its kernels.

    Seconds of this thread, which others of a team work beside: what other processes take is not in them.
    """
    seconds = []
    for _ in range(4):
        began = _clock()
        run()
        seconds.append(_clock() - began)
    return min(seconds[1:])
