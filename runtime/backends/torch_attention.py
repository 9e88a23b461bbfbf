"""One layer's part of the torch backend's key-value cache, in rows and in pages, for packed tokens ``[1, T, ...]``.

For both see :class:`qwen2vl_trt.decoder.LayerCache`. Letters: T new tokens of all sequences, B sequences, M cache
capacity, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.ops import full_attention
from qwen2vl_trt.varlen import paged_attention

from .common import Places
from .steps import Chunk


class _Alike(NamedTuple):
    """So many chunks of equal length and end, which attend in one call."""

    tokens: slice | Tensor
    slots: slice | Tensor
    number: int
    end: int


class SlotStep(NamedTuple):
    """A step over a cache of rows, ``[slots, Hkv, M, D]``: what all layers share."""

    slots: Tensor
    positions: Tensor
    groups: list[_Alike]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device) -> SlotStep:
        """Of chunks of different slots."""
        slots, positions = (torch.from_numpy(each).to(device) for each in Places.of(chunks))
        begins = [0, *accumulate(chunk.length for chunk in chunks)]
        alike: dict[tuple[int, int], list[int]] = {}
        for number, chunk in enumerate(chunks):
            alike.setdefault((chunk.length, chunk.end), []).append(number)
        groups = []
        for (length, end), numbers in alike.items():
            tokens = [begins[number] + offset for number in numbers for offset in range(length)]
            rows = [chunks[number].slot for number in numbers]
            groups.append(_Alike(_indices(tokens, device), _indices(rows, device), len(numbers), end))
        return cls(slots, positions, groups)


class SlotCache(NamedTuple):
    """``k`` and ``v`` of ``[slots, Hkv, M, D]``."""

    k: Tensor
    v: Tensor
    step: SlotStep

    @property
    def slot_mapping(self) -> None:
        return None

    def append(self, k: Tensor, v: Tensor) -> SlotCache:
        for cache, new in ((self.k, k), (self.v, v)):
            cache.transpose(1, 2)[self.step.slots, self.step.positions] = new[0].transpose(0, 1)
        return self

    def attend(self, q: Tensor) -> Tensor:
        groups = self.step.groups
        out = torch.empty_like(q) if len(groups) > 1 else q
        for tokens, slots, number, end in groups:
            own = q[0, :, tokens].unflatten(1, (number, -1)).transpose(0, 1)  # [number, H, S, D]
            y = full_attention(own, self.k[slots, :, :end], self.v[slots, :, :end], causal=True)
            y = y.transpose(0, 1).flatten(1, 2)
            if len(groups) == 1:
                return y[None]
            out[0, :, tokens] = y
        return out


def _indices(numbers: list[int], device: torch.device) -> slice | Tensor:
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class PageStep:
    """A step over a cache of pages, ``[pages, 256, Hkv, D]``: what all layers share.

    Attributes:
        slot_mapping: ``[T]`` int64, see :meth:`~.paged_cache.PagedKVCache.slot_mapping`.
        cu_seqlens: ``[B + 1]`` int32, where the tokens of each sequence begin, and T.
        lengths: ``[B]`` int32, keys of each sequence, the new ones included.
        block_table: ``[B, pages]`` int32.
        longest: most new tokens of a sequence.
        fused: use :func:`qwen2vl_trt.varlen.paged_attention`.
        chunks: what runs, for attention without it; unused where each has one token.
    """

    slot_mapping: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    block_table: Tensor
    longest: int
    fused: bool
    chunks: Sequence[Chunk] = ()


class PageCache(NamedTuple):
    """``k`` and ``v`` of ``[pages, 256, Hkv, D]``."""

    k: Tensor
    v: Tensor
    step: PageStep

    @property
    def slot_mapping(self) -> Tensor:
        return self.step.slot_mapping

    def append(self, k: Tensor, v: Tensor) -> PageCache:
        for cache, new in ((self.k, k), (self.v, v)):
            cache.flatten(0, 1)[self.step.slot_mapping] = new[0].transpose(0, 1)
        return self

    def attend(self, q: Tensor) -> Tensor:
        step = self.step
        if step.fused:
            y = paged_attention(
                q[0].transpose(0, 1), self.k, self.v, step.cu_seqlens, step.longest, step.lengths, step.block_table
            )
            return y.transpose(0, 1)[None]
        return self._attend_tokens(q) if step.longest == 1 else self._attend_chunks(q)

    def _attend_tokens(self, q: Tensor) -> Tensor:
        """One token a sequence, with a mask; the query heads that share a key-value head become its queries."""
        k, v = (cache[self.step.block_table].flatten(1, 2) for cache in (self.k, self.v))
        valid = torch.arange(k.shape[1], device=q.device) < self.step.lengths[:, None]
        # A masked key still enters the arithmetic, and page 0 may hold NaN of what pads.
        k, v = (t.masked_fill_(~valid[:, :, None, None], 0).transpose(1, 2) for t in (k, v))
        shared = q[0].transpose(0, 1).unflatten(1, (k.shape[1], -1))  # [B, Hkv, H / Hkv, D]
        y = F.scaled_dot_product_attention(shared, k, v, attn_mask=valid[:, None, None])
        return y.flatten(1, 2).transpose(0, 1)[None]

    def _attend_chunks(self, q: Tensor) -> Tensor:
        out, first = torch.empty_like(q), 0
        for chunk, pages in zip(self.step.chunks, self.step.block_table):
            tokens = slice(first, first + chunk.length)
            k, v = (cache[pages].flatten(0, 1)[: chunk.end].transpose(0, 1)[None] for cache in (self.k, self.v))
            out[:, :, tokens] = full_attention(q[:, :, tokens], k, v, causal=True)
            first = tokens.stop
        return out
