"""How the torch backend writes to and attends to its cache on a GPU: without reading what no row uses.

See :class:`qwen2vl_trt.decoder.LayerCache`. Letters: B batch, S new tokens, T = B S, M cache capacity, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.decoder import SlotMapping
from qwen2vl_trt.ops import full_attention
from qwen2vl_trt.varlen import CuSeqlens, decode_attention, prefill_attention


@dataclass(frozen=True)
class Chunk:
    """Rows that all hold the same number of tokens, which the host knows: a chunk of a prompt.

    Attributes:
        first: the first of B neighbouring slots.
        end: tokens in each afterwards.
        fused: use :func:`qwen2vl_trt.varlen.prefill_attention`.
        slot_mapping: of the B * S new tokens, on the cache's device.
    """

    first: int
    end: int
    fused: bool
    slot_mapping: SlotMapping


class ChunkCache(NamedTuple):
    """One layer's cache for a chunk: ``k`` and ``v`` of ``[slots, Hkv, M, D]``."""

    k: Tensor
    v: Tensor
    chunk: Chunk

    @property
    def slot_mapping(self) -> SlotMapping:
        return self.chunk.slot_mapping

    def append(self, k: Tensor, v: Tensor) -> ChunkCache:
        return _append(self, k, v)

    def attend(self, q: Tensor) -> Tensor:
        chunk = self.chunk
        k, v = (cache[chunk.first : chunk.first + len(q), :, : chunk.end] for cache in (self.k, self.v))
        if chunk.fused:
            return prefill_attention(q, k, v)
        return full_attention(q, k, v, causal=True)


@dataclass(frozen=True)
class NewTokens:
    """One new token in each of the first B slots: what all layers share, made once a step.

    Attributes:
        slot_mapping: of the B new tokens.
        longest: keys that are read at most; every row's tokens and its new one fit.
        fused: lengths ``[B]`` int32 and bounds for the fused kernel; None without it.
        mask: ``[B, 1, 1, longest]`` added to scores where there is no fused kernel.
    """

    slot_mapping: SlotMapping
    longest: int
    fused: tuple[Tensor, CuSeqlens] | None
    mask: Tensor | None

    @classmethod
    def of(
        cls, slot_mapping: SlotMapping, lengths: Tensor, longest: int, dtype: torch.dtype, bounds: CuSeqlens | None
    ) -> NewTokens:
        """What a step needs.

        Args:
            slot_mapping: rows are 0 to B - 1.
            lengths: ``[B]`` int64 keys that each row attends to.
            longest: no less than any length.
            dtype: of queries and keys.
            bounds: of B rows, for :func:`qwen2vl_trt.varlen.decode_attention`; None without the fused kernel.
        """
        if bounds is not None:
            return cls(slot_mapping, longest, (lengths.int(), bounds), None)
        beyond = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill(beyond, -torch.inf)
        return cls(slot_mapping, longest, None, mask[:, None, None])


class NewTokenCache(NamedTuple):
    """One layer's cache ``[slots, Hkv, M, D]`` in a step of one new token a slot; reads ``new.longest`` keys of it."""

    k: Tensor
    v: Tensor
    new: NewTokens

    @property
    def slot_mapping(self) -> SlotMapping:
        return self.new.slot_mapping

    def append(self, k: Tensor, v: Tensor) -> NewTokenCache:
        return _append(self, k, v)

    def attend(self, q: Tensor) -> Tensor:
        new, k, v = self.new, self.k[: len(q)], self.v[: len(q)]
        if new.fused is not None:
            lengths, bounds = new.fused
            return decode_attention(q[:, :, 0], k, v, lengths, new.longest, bounds)[:, :, None]
        assert new.mask is not None
        # The query heads that share a key-value head become its queries: each key is read once, not once a head.
        shared = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        mask = new.mask.expand(-1, shared.shape[1], shared.shape[2], -1)
        k, v = k[:, :, : new.longest], v[:, :, : new.longest]
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).reshape(q.shape)


_Placed = TypeVar("_Placed", ChunkCache, NewTokenCache)


def _append(cache: _Placed, k: Tensor, v: Tensor) -> _Placed:
    rows, positions = cache.slot_mapping
    for whole, new in ((cache.k, k), (cache.v, v)):
        whole[rows, :, positions] = new.transpose(1, 2).flatten(0, 1)
    return cache
