"""What the runners of every backend share: the key-value cache, text embeddings, a step's inputs, cached layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import LimitError
from qwen2vl_trt.transfer import to_device
from qwen2vl_trt.weights import EMBEDDING, checkpoint_names
from qwen2vl_trt.windows import WindowLayout

_SMALLEST = 128


class KVCache:
    """Per layer ``k`` and ``v`` of ``[slots, Hkv, capacity, D]``; a slot is one contiguous row.

    The capacity follows what is used, in powers of two up to ``max_seq_len``: ONNX Runtime's attention computes
    over all of it, whatever the rows' lengths. Or it is ``fixed`` at ``max_seq_len``: TensorRT takes no other.

    Attributes:
        owner: who wrote last; a scheduler that finds another's mark trusts nothing that it left here.
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
        self._least = max_seq_len if fixed else min(_SMALLEST, max_seq_len)
        self._dtype, self._device = dtype, device
        self._config = config
        self.k, self.v = self._allocate(self._least)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache now."""
        return sum(cache.nbytes for cache in (*self.k, *self.v))

    @property
    def capacity(self) -> int:
        """M, positions a row has now."""
        return self.k[0].shape[2]

    def reserve(self, length: int) -> None:
        """Make room for rows of ``length`` positions, keeping what is written.

        Raises:
            LimitError: more than ``max_seq_len``.
        """
        if length > self.max_seq_len:
            raise LimitError(f"{length:,} tokens do not fit the cache of {self.max_seq_len:,} (--max-seq-len)")
        if length <= self.capacity:
            return
        self._resize(self._bucket(length))

    def trim(self, length: int) -> None:
        """Shrink to what rows of ``length`` positions need, keeping those; for when no longer row is in use."""
        capacity = self._bucket(length)
        if capacity < self.capacity:
            self._resize(capacity)

    def reset(self) -> None:
        """Shrink to the smallest size: for when no slot is in use."""
        self.trim(0)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot ``target`` the first ``length`` positions of slot ``source``, on the device."""
        for cache in (*self.k, *self.v):
            cache[target, :, :length] = cache[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot in which NaN may lie: a masked key still enters the arithmetic, and NaN times zero is NaN."""
        for cache in (*self.k, *self.v):
            cache[slot].zero_()

    def rows(self, first: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Views ``[count, Hkv, capacity, D]`` of neighbouring slots, contiguous."""
        return [k[first : first + count] for k in self.k], [v[first : first + count] for v in self.v]

    def _bucket(self, length: int) -> int:
        return min(self.max_seq_len, max(self._least, 1 << (max(length, 1) - 1).bit_length()))

    def _resize(self, capacity: int) -> None:
        """Both caches are allocated before either is given up: out of memory leaves everything as it was."""
        k, v = self._allocate(capacity)
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
    """Embeds text tokens outside the engines: the decoder takes embeddings, so that images can stand among them.

    On a CPU the table stays mapped to its file, in its own type; a lookup reads a few rows of it.

    Args:
        table: ``[V, C]`` on the device, where a decoder has it there already.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, table: Tensor | None = None
    ) -> None:
        self._table = checkpoint.load(checkpoint_names(checkpoint)[EMBEDDING]) if table is None else table
        self._dtype, self._device = dtype, device
        if device.type != "cpu":
            self._table = self._table.to(device, dtype)

    def __call__(self, token_ids: list[int]) -> Tensor:
        """n token ids to ``[n, C]``."""
        return F.embedding(to_device(token_ids, self._table.device), self._table).to(self._dtype)


def step_inputs(inputs_embeds: Tensor, position_ids: Tensor, starts: Sequence[int]) -> dict[str, Tensor]:
    """The decoder graph's inputs (:mod:`qwen2vl_trt.export.graphs`) besides the caches; no row is padded.

    Args:
        inputs_embeds: ``[B, S, C]``.
        position_ids: ``[3, B, S]`` int64.
        starts: B numbers of tokens that the slots hold so far.
    """
    batch, length, _ = inputs_embeds.shape
    start = torch.tensor(starts)
    return {
        "inputs_embeds": inputs_embeds,
        "position_ids": position_ids,
        "cache_start": start,
        "kv_lengths": start + length,
        "last_token": torch.full((batch,), length - 1),
    }


_Indices = TypeVar("_Indices")


def cached_layouts(place: Callable[[WindowLayout], _Indices]) -> Callable[[WindowLayout], _Indices]:
    """``place``, which puts a layout's index tensors on a device, with the results of the last 64 layouts cached.

    Index tensors depend on the sizes of the images alone, and the same sizes come again; each takes a few megabytes.
    """
    return lru_cache(maxsize=64)(place)


# MERGED runtime/backends/common.py: """Which slots and how many keys a captured decode step runs over: a handful of shapes instead of one for each request.  A CUDA graph is captured for fixed shapes and addresses. So a step of any neighbouring slots runs the first 1, 2, 4, ... slots, as many as hold it: a handful of graphs, where one for each choice of neighbours would be a square of them. A slot that only fills up the batch writes beyond its tokens, as :mod:`qwen2vl_trt.runtime.scheduling.scheduler` lets it, and attends to one. """
_SHORTEST = 128


def graph_size(rows: int, slots: int) -> int:
    """How many slots a graph runs that has to reach the first ``rows``: a power of two, or all."""
    return min(1 << (rows - 1).bit_length(), slots)


def graph_length(longest: int, capacity: int) -> int:
    """How many keys of a slot a graph reads that has to reach ``longest``: a power of two, or all."""
    return min(max(_SHORTEST, 1 << (longest - 1).bit_length()), capacity)


def graph_sizes(slots: int) -> list[int]:
    """Every :func:`graph_size`, the smallest first."""
    return sorted({graph_size(rows, slots) for rows in range(1, slots + 1)})


def graph_lengths(longest: int, capacity: int) -> list[int]:
    """Every :func:`graph_length` of up to ``longest`` keys, the shortest first."""
    return sorted({graph_length(length, capacity) for length in range(1, longest + 1)})


def graph_rows(
    first: int, starts: Sequence[int], held: Sequence[int], size: int, capacity: int
) -> tuple[list[int], list[int]] | None:
    """``cache_start`` and ``kv_lengths`` of the first ``size`` slots.

    Args:
        first: the first slot of the step.
        starts: tokens that the step's slots hold.
        held: tokens that each slot holds.
        size: slots that the graph runs.
        capacity: positions of a slot.

    Returns:
        None where a slot that only fills up is full: it has no place to write to that does no harm.
    """
    last = first + len(starts)
    others = [*range(first), *range(last, size)]
    if any(held[row] >= capacity for row in others):
        return None
    cache_start, kv_lengths = list(held[:size]), [1] * size
    cache_start[first:last] = starts
    kv_lengths[first:last] = [start + 1 for start in starts]
    return cache_start, kv_lengths
