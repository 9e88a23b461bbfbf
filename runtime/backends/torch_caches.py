"""How the torch backend writes to and attends to its cache on a GPU: without reading what no row uses.

See :class:`qwen2vl_trt.decoder.LayerCache`. Letters: B batch, S new tokens, M cache capacity, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.ops import full_attention
from qwen2vl_trt.varlen import cached_attention, chunk_attention


class ChunkCache(NamedTuple):
    """Rows that all hold the same number of tokens, which the host knows: a chunk of a prompt.

    Attributes:
        k: ``[B, Hkv, M, D]``.
        v: likewise.
        start: tokens in each row so far.
        end: ``start + S``.
        fused: use :func:`qwen2vl_trt.varlen.chunk_attention`.
    """

    k: Tensor
    v: Tensor
    start: int
    end: int
    fused: bool

    def append(self, k: Tensor, v: Tensor) -> ChunkCache:
        self.k[:, :, self.start : self.end] = k
        self.v[:, :, self.start : self.end] = v
        return self

    def attend(self, q: Tensor) -> Tensor:
        k, v = self.k[:, :, : self.end], self.v[:, :, : self.end]
        if self.fused:
            return chunk_attention(q, k, v)
        return full_attention(q, k, v, causal=True)


@dataclass(frozen=True)
class NewTokens:
    """One new token a row: what all layers share, made once a step.

    Attributes:
        rows: ``[B]`` 0 to B - 1.
        starts: ``[B]`` int64 tokens in each row so far.
        longest: keys that are read at most; every row's tokens and its new one fit.
        lengths: ``[B]`` int32 keys of each row, for the fused kernel; None without it.
        mask: ``[B, 1, 1, longest]`` added to scores where there is no fused kernel.
    """

    rows: Tensor
    starts: Tensor
    longest: int
    lengths: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, longest: int, dtype: torch.dtype, fused: bool) -> NewTokens:
        """From ``[B]`` int64 each: tokens so far, and keys that each row attends to.

        Args:
            longest: no less than any length.
            dtype: of queries and keys.
            fused: use :func:`qwen2vl_trt.varlen.cached_attention`.
        """
        rows = torch.arange(len(starts), device=starts.device)
        if fused:
            return cls(rows, starts, longest, lengths.int(), None)
        beyond = torch.arange(longest, device=starts.device) >= lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=starts.device).masked_fill(beyond, -torch.inf)
        return cls(rows, starts, longest, None, mask[:, None, None])


class NewTokenCache(NamedTuple):
    """One layer's cache in a step of one new token a row; reads no more than ``new.longest`` keys of a row."""

    k: Tensor
    v: Tensor
    new: NewTokens

    def append(self, k: Tensor, v: Tensor) -> NewTokenCache:
        self.k[self.new.rows, :, self.new.starts] = k[:, :, 0]
        self.v[self.new.rows, :, self.new.starts] = v[:, :, 0]
        return self

    def attend(self, q: Tensor) -> Tensor:
        new = self.new
        if new.lengths is not None:
            return cached_attention(q[:, :, 0], self.k, self.v, new.lengths, new.longest)[:, :, None]
        assert new.mask is not None
        # The query heads that share a key-value head become its queries: each key is read once, not once a head.
        shared = q.reshape(q.shape[0], self.k.shape[1], -1, q.shape[3])
        mask = new.mask.expand(-1, shared.shape[1], shared.shape[2], -1)
        k, v = self.k[:, :, : new.longest], self.v[:, :, : new.longest]
        return F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).reshape(q.shape)
