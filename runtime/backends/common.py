"""What the runners share: key-value cache, token embeddings, decoder inputs, and the shapes of captured CUDA graphs.

A CUDA graph is captured for fixed shapes and addresses. So a decode step over any neighbouring slots runs the first
1, 2, 4, ... slots, which takes few graphs. A slot that only pads the batch writes behind its own tokens, which
:mod:`qwen2vl_trt.runtime.scheduling.scheduler` allows, and attends to one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import LimitError
from qwen2vl_trt.transfer import to_device
from qwen2vl_trt.weights import EMBEDDING, checkpoint_names

_MIN_LENGTH = 128

cached_layouts = lru_cache(maxsize=64)
"""Decorates what puts a layout's index tensors on a device: they depend on image sizes alone, which repeat."""


class KVCache:
    """``k`` and ``v`` of every layer, each ``[slots, Hkv, capacity, D]``; a slot is one contiguous row.

    The capacity grows with use, in powers of two up to ``max_seq_len``: ONNX Runtime attends over all of it, however
    short the sequences. With ``fixed`` it is always ``max_seq_len``, as TensorRT and CUDA graphs require.

    Attributes:
        owner: the scheduler that wrote last. Another scheduler must not reuse its tokens.
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
        self.slots, self.max_seq_len = slots, max_seq_len
        self._min_capacity = max_seq_len if fixed else min(_MIN_LENGTH, max_seq_len)
        self._config, self._dtype, self._device = config, dtype, device
        self.k, self.v = self._allocate(self._min_capacity)

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

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN: a masked key still enters the arithmetic, and NaN times zero is NaN."""
        for cache in (*self.k, *self.v):
            cache[slot].zero_()

    def rows(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Contiguous views ``[count, Hkv, capacity, D]`` of neighbouring slots."""
        return [k[first : first + count] for k in self.k], [v[first : first + count] for v in self.v]

    def _bucket(self, length: int) -> int:
        return min(self.max_seq_len, max(self._min_capacity, 1 << (max(length, 1) - 1).bit_length()))

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

    def __call__(self, token_ids: list[int]) -> Tensor:
        """n token ids to ``[n, C]``."""
        return F.embedding(to_device(token_ids, self._table.device), self._table).to(self._dtype)


def step_inputs(inputs_embeds: Tensor, position_ids: Tensor, starts: Sequence[int]) -> dict[str, Tensor]:
    """The decoder graph's inputs without the caches, see :meth:`~.runners.DecoderRunner.step`; no row is padded."""
    batch, length, _ = inputs_embeds.shape
    start = torch.tensor(starts)
    return {
        "inputs_embeds": inputs_embeds,
        "position_ids": position_ids,
        "cache_start": start,
        "kv_lengths": start + length,
        "last_token": torch.full((batch,), length - 1),
    }


def padded_batch(rows: int, slots: int) -> int:
    """Slots that the graph for the first ``rows`` slots runs over: a power of two, or all."""
    return min(1 << (rows - 1).bit_length(), slots)


def padded_length(longest: int, capacity: int) -> int:
    """Keys that the graph for slots of up to ``longest`` keys reads: a power of two, or all."""
    return min(max(_MIN_LENGTH, 1 << (longest - 1).bit_length()), capacity)


def graph_batches(slots: int) -> list[int]:
    """Every :func:`padded_batch`, ascending."""
    return sorted({padded_batch(rows, slots) for rows in range(1, slots + 1)})


def graph_lengths(longest: int, capacity: int) -> list[int]:
    """Every :func:`padded_length` of up to ``longest`` keys, ascending."""
    return sorted({padded_length(length, capacity) for length in range(1, longest + 1)})


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
