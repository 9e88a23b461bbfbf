"""PyTorch's own FlashAttention operator, ``aten::_flash_attention_forward``, for packed sequences and for the cache.

It needs an NVIDIA GPU from Ampere on, FP16 or BF16, and a head size that is a multiple of 8. PyTorch does not promise
to keep it, so it is tried on small tensors first. Why not ``varlen_attn`` or SDPA: docs/design/torch.md.

Letters: P tokens of all sequences, B sequences, N pages of a sequence, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import missing_arguments

logger = logging.getLogger(__name__)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlen: tuple[int, int],
    causal: bool = False,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The operator over packed queries. Only the last dimension must be contiguous.

    Args:
        q: ``[P, H, D]``, as the result.
        k: ``[tokens, Hkv, D]``, or with a block table ``[pages, page size, Hkv, D]``; as ``v``.
        cu_seqlens: of q and of k, ``[B + 1]`` int32 each; that of k is not looked at with ``lengths``.
        max_seqlen: of q and of k.
        causal: lower-right: the last query of a sequence sees all its keys.
        lengths: ``[B]`` int32, keys of each sequence, from its beginning; by default all.
        block_table: ``[B, pages of a sequence]`` int32; the page size is a multiple of 256.
    """
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *cu_seqlens, *max_seqlen, 0.0, causal, False, seqused_k=lengths, block_table=block_table
    )[0]


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Bidirectional attention within packed sequences: q, k, v and the result are ``[P, H, D]``.

    Args:
        cu_seqlens: ``[B + 1]`` int32, where each sequence begins, and P.
        max_seqlen: tokens of the longest one.
    """
    return flash_attention(q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen))


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, lengths: Tensor, block_table: Tensor
) -> Tensor:
    """Causal attention of each sequence's last tokens ``[P, H, D]``, packed, to its keys in pages.

    Args:
        q: queries; a sequence with more of them than keys gets zeros for the first.
        k: ``[pages, page size, Hkv, D]``, as ``v``.
        cu_seqlens: ``[B + 1]`` int32, where the queries of each sequence begin, and P.
        max_seqlen: most queries of a sequence.
        lengths: ``[B]`` int32, keys of each sequence; no others are read.
        block_table: ``[B, N]`` int32, the pages of each sequence.
    """
    most = block_table.shape[1] * k.shape[1]
    return flash_attention(q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, most), True, lengths, block_table)


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
def has_paged_attention(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether :func:`paged_attention` runs here and is right, for one new token a sequence and for several."""
    if not _fits(dtype, head_dim):
        return False

    def differs() -> Tensor:
        k, v = _noise((2, 4, 256, kv_heads, head_dim), dtype, device).unbind(0)
        table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device)
        lengths, errors = (3, 300), []
        for new in ((1, 1), (3, 2)):
            # As in a captured step, a sequence with more queries than keys and an empty one fill it up.
            padded, counts = (*new, *((5, 0) if max(new) > 1 else ())), (*lengths, 1, 1)
            q = _noise((sum(padded), heads, head_dim), dtype, device)
            cu_seqlens, used = (
                torch.tensor(numbers, dtype=torch.int32, device=device)
                for numbers in ([0, *accumulate(padded)], counts[: len(padded)])
            )
            pages = torch.cat([table, table.new_zeros(len(padded) - 2, 2)])
            found = paged_attention(q, k, v, cu_seqlens, max(padded), used, pages).split(padded)
            errors += [each.abs().max() for each in found[2:3] if not each.isfinite().all()]
            for row, (query, length) in enumerate(zip(q.split(padded), lengths)):
                key, value = (t[table[row].long()].flatten(0, 1)[:length].transpose(0, 1).float() for t in (k, v))
                mask = torch.ones(new[row], length, dtype=torch.bool, device=device).tril(length - new[row])
                expected = F.scaled_dot_product_attention(
                    query.transpose(0, 1).float(), key, value, attn_mask=mask, enable_gqa=heads != kv_heads
                )
                errors.append((found[row].transpose(0, 1) - expected).abs().max())
        return torch.stack(errors).max()

    return _holds("attention to the paged cache", device, differs)


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
