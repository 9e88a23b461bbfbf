"""Attention over sequences of different lengths in one call, without padding: FlashAttention's varlen kernels.

PyTorch offers them since 2.10 as ``torch.nn.attention.varlen.varlen_attn``, and takes keys of a cache since its
``seqused_k`` came. They need an NVIDIA GPU from Ampere on, FP16 or BF16, and a head size that is a multiple of 8.
Whether a machine has them is found out by asking them for something small, whose answer is known.

Letters: P tokens of all sequences, B sequences, M cache capacity, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


def kernel() -> Callable[..., Any] | None:
    """PyTorch's ``varlen_attn``; None where it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Attention within sequences that lie one behind another; every token sees its whole sequence.

    Args:
        q: ``[P, H, D]``; as k and v, of any stride between tokens and heads.
        k: ``[P, H, D]``.
        v: ``[P, H, D]``.
        bounds: ``[B + 1]`` int32, where each sequence begins, and P.
        longest: tokens of the longest one.

    Returns:
        ``[P, H, D]``.
    """
    attend = kernel()
    assert attend is not None
    return attend(q, k, v, bounds, bounds, longest, longest)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Attention of one new token a row to the first keys of its row of a cache; reads no others.

    The kernel takes keys as ``[tokens, Hkv, D]``, and a row of the cache is ``[Hkv, M, D]``. Strides make it fit: a
    token is D numbers from the next, a head M * D, and row b begins at token b * Hkv * M.

    Args:
        q: ``[B, H, D]``.
        k: ``[B, Hkv, M, D]``, contiguous; H is a multiple of Hkv.
        v: as ``k``.
        lengths: ``[B]`` int32, valid keys of each row.
        longest: no row has more; the kernel shares its work out by this number.

    Returns:
        ``[B, H, D]``.
    """
    attend = kernel()
    assert attend is not None
    batch, heads, capacity, size = k.shape
    shape = ((batch - 1) * heads * capacity + capacity, heads, size)
    keys, values = (t.as_strided(shape, (size, capacity * size, 1)) for t in (k, v))
    rows = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    begin = rows * (heads * capacity)
    grouped = q.shape[1] != heads
    return attend(q, keys, values, rows, begin, 1, longest, enable_gqa=grouped, seqused_k=lengths)


@lru_cache(maxsize=64)
def can_pack(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether :func:`packed_attention` runs here, and right."""
    if kernel() is None or not _fits(dtype, head_dim):
        return False

    def differs() -> float:
        q, k, v = _noise((3, 5, heads, head_dim), dtype, device).unbind(0)
        bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        found = packed_attention(q, k, v, bounds, 3)
        expected = []
        for part in (slice(0, 2), slice(2, 5)):
            queries, keys, values = (t[part].transpose(0, 1) for t in (q, k, v))
            expected.append(F.scaled_dot_product_attention(queries, keys, values).transpose(0, 1))
        return float((found - torch.cat(expected)).abs().max())

    return _holds("packed attention", device, differs)


@lru_cache(maxsize=64)
def can_read_cache(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether :func:`cached_attention` runs here, and right."""
    attend = kernel()
    if attend is None or not _fits(dtype, head_dim):
        return False
    if not {"seqused_k", "enable_gqa"} <= set(inspect.signature(attend).parameters):
        return False

    def differs() -> float:
        q = _noise((2, heads, head_dim), dtype, device)
        k, v = _noise((2, 2, kv_heads, 130, head_dim), dtype, device).unbind(0)
        found = cached_attention(q, k, v, torch.tensor([3, 129], dtype=torch.int32, device=device), 130)
        expected = [
            F.scaled_dot_product_attention(
                q[row, :, None], k[row, :, :length], v[row, :, :length], enable_gqa=heads != kv_heads
            )[:, 0]
            for row, length in enumerate((3, 129))
        ]
        return float((found - torch.stack(expected)).abs().max())

    return _holds("attention to the cache", device, differs)


def _fits(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


_TOLERANCE = 0.05
"""Of values around 1 in BF16; a wrong key or a wrong length differs by several times that."""


def _holds(what: str, device: torch.device, differs: Callable[[], float]) -> bool:
    try:
        with torch.no_grad():
            difference = differs()
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        logger.info("no fused %s on %s: %s", what, device, " ".join(str(error).split())[:200])
        return False
    if not difference < _TOLERANCE:
        logger.warning("fused %s on %s is wrong by %.3g; it is left out, which costs time", what, device, difference)
        return False
    return True
