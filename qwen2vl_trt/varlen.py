"""PyTorch's own FlashAttention operator, ``aten::_flash_attention_forward``, for packed sequences and for the cache.

It needs an NVIDIA GPU from Ampere on, FP16 or BF16, and a head size that is a multiple of 8. PyTorch does not promise
to keep it, so it is tried on small tensors first. Why not ``varlen_attn`` or SDPA: docs/design/torch.md.

Letters: P tokens of all sequences, B sequences, S new tokens, M cache capacity, N keys, H query heads, Hkv key-value
heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import missing_arguments

logger = logging.getLogger(__name__)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    max_seqlen: tuple[int, int],
    causal: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """The operator. Only the last dimension must be contiguous.

    Args:
        q: ``[P, H, D]`` with ``cu_seqlens``, else ``[B, S, H, D]``, as the result.
        k: ``[tokens, Hkv, D]`` or ``[B, N, Hkv, D]``, as ``v``.
        cu_seqlens: of q and of k, ``[B + 1]`` int32 each.
        max_seqlen: of q and of k.
        causal: lower-right: the last query of a sequence sees all its keys.
        lengths: ``[B]`` int32, keys of each sequence, from its beginning; by default all.
    """
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *(cu_seqlens or (None, None)), *max_seqlen, 0.0, causal, False, seqused_k=lengths
    )[0]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Bidirectional attention within packed sequences: q, k, v and the result are ``[P, H, D]``.

    Args:
        cu_seqlens: ``[B + 1]`` int32, where each sequence begins, and P.
        max_seqlen: tokens of the longest one.
    """
    return flash_attention(q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen))


def prefill_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last S tokens of each row: q ``[B, H, S, D]`` to k and v ``[B, Hkv, N, D]``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash_attention(q, k, v, None, (q.shape[1], k.shape[1]), causal=True).transpose(1, 2)


class CuSeqlens(NamedTuple):
    """Where each row's query and its keys begin, ``[B + 1]`` int32; the same for every layer and step."""

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, rows: int, k: Tensor) -> CuSeqlens:
        """Of a cache ``[>= rows, Hkv, M, D]`` like ``k``."""
        queries = torch.arange(rows + 1, dtype=torch.int32, device=k.device)
        return cls(queries, queries * (k.shape[1] * k.shape[2]))


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, max_seqlen: int, cu_seqlens: CuSeqlens
) -> Tensor:
    """Attention of one new token a row, ``q [B, H, D]``, to the valid keys of the cache ``[B, Hkv, M, D]``, contiguous.

    The kernel takes keys as ``[tokens, Hkv, D]``; strides give the cache ``[B, Hkv, M, D]`` that shape: tokens are D
    apart, heads M * D, and row b begins at token b * Hkv * M.

    Args:
        lengths: ``[B]`` int32, valid keys of each row; no others are read.
        max_seqlen: no length is greater; the kernel splits its work by it.
        cu_seqlens: of B rows of ``k``.
    """
    batch, heads, capacity, size = k.shape
    shape = ((batch - 1) * heads * capacity + capacity, heads, size)
    keys, values = (t.as_strided(shape, (size, capacity * size, 1)) for t in (k, v))
    return flash_attention(q, keys, values, cu_seqlens, (1, max_seqlen), lengths=lengths)


@lru_cache(maxsize=64)
def has_packed_attention(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether :func:`packed_attention` runs here and is right."""
    if not _fits(dtype, head_dim):
        return False

    def differs() -> Tensor:
        q, k, v = _noise((3, 5, heads, head_dim), dtype, device).unbind(0)
        cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        found = packed_attention(q, k, v, cu_seqlens, 3)
        expected = []
        for part in (slice(0, 2), slice(2, 5)):
            queries, keys, values = (t[part].transpose(0, 1).float() for t in (q, k, v))
            expected.append(F.scaled_dot_product_attention(queries, keys, values).transpose(0, 1))
        return (found - torch.cat(expected)).abs().max()

    return _holds("packed attention", device, differs)


@lru_cache(maxsize=64)
def has_cache_attention(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether :func:`decode_attention` and :func:`prefill_attention` run here and are right."""
    if not _fits(dtype, head_dim):
        return False

    def differs() -> Tensor:
        k, v = _noise((2, 2, kv_heads, 130, head_dim), dtype, device).unbind(0)
        q = _noise((2, heads, 3, head_dim), dtype, device)
        lengths = (3, 129)
        counts = torch.tensor(lengths, dtype=torch.int32, device=device)
        step = decode_attention(q[:, :, 2], k, v, counts, 130, CuSeqlens.of(2, k))
        errors = []
        for row, length in enumerate(lengths):
            query, key, value = q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length]
            mask = torch.ones(3, length, dtype=torch.bool, device=device).tril(length - 3)
            expected = F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=mask, enable_gqa=heads != kv_heads
            )
            errors += [prefill_attention(query, key, value) - expected, (step[row] - expected[0, :, 2])]
        return torch.stack([error.abs().max() for error in errors]).max()

    return _holds("attention to the cache", device, differs)


def _fits(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


_TOLERANCE = 0.05
"""Of values around 1 in BF16; a wrong key or length differs by several times that."""


def _holds(what: str, device: torch.device, differs: Callable[[], Tensor]) -> bool:
    reason = missing_arguments("_flash_attention_forward", "cum_seq_q", "cum_seq_k", "seqused_k", "block_table")
    if reason is None:
        try:
            with torch.no_grad():
                difference = float(differs())
            reason = None if difference < _TOLERANCE else f"it is wrong by {difference:.3g}"
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
    if reason is not None:
        logger.warning(
            "no fused %s on %s, which costs time and memory (padding is computed too, under a mask): %s",
            what,
            device,
            reason,
        )
    return reason is None
