"""FlashAttention as PyTorch brings it: sequences of different lengths in one call, and keys where a cache holds them.

One operator, ``aten::_flash_attention_forward``, which is beneath both ``scaled_dot_product_attention`` and
``torch.nn.attention.varlen.varlen_attn``. The former prefers cuDNN on Hopper and Blackwell, which builds a plan for
every new length of a prompt; the latter takes neither a cache's lengths nor grouped queries in PyTorch 2.11. The
operator needs an NVIDIA GPU from Ampere on, FP16 or BF16, and a head size that is a multiple of 8. PyTorch does not
promise to keep it, so whether a machine has it is found out by asking for something small, whose answer is known.

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

logger = logging.getLogger(__name__)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    causal: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """The operator.

    Args:
        q: ``[P, H, D]`` with bounds, else ``[B, S, H, D]``; of any stride but the last.
        k: ``[tokens, Hkv, D]`` or ``[B, N, Hkv, D]``; H is a multiple of Hkv.
        v: as ``k``.
        bounds: ``[B + 1]`` int32 each, where each sequence of q and of k begins, and their ends.
        longest: tokens of the longest sequence of q and of k.
        causal: lower-right: the last query of a sequence sees all its keys.
        lengths: ``[B]`` int32, keys of each sequence, from its beginning; by default all.

    Returns:
        As ``q``.
    """
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *(bounds or (None, None)), *longest, 0.0, causal, False, seqused_k=lengths
    )[0]


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
    return flash(q, k, v, (bounds, bounds), (longest, longest))


def chunk_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a chunk of every row to all its keys up to itself.

    Args:
        q: ``[B, H, S, D]``, the last tokens of each row.
        k: ``[B, Hkv, N, D]``; as q and v, of any stride but the last.
        v: as ``k``.

    Returns:
        ``[B, H, S, D]``.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flash(q, k, v, None, (q.shape[1], k.shape[1]), causal=True).transpose(1, 2)


class CacheBounds(NamedTuple):
    """Where each row's query and its keys begin, ``[B + 1]`` int32 both; the same for every layer and every step."""

    queries: Tensor
    keys: Tensor

    @classmethod
    def of(cls, rows: int, k: Tensor) -> CacheBounds:
        """For so many rows of caches ``[>= B, Hkv, M, D]`` such as ``k``."""
        queries = torch.arange(rows + 1, dtype=torch.int32, device=k.device)
        return cls(queries, queries * (k.shape[1] * k.shape[2]))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, bounds: CacheBounds) -> Tensor:
    """Attention of one new token a row to the first keys of its row of a cache; reads no others.

    The kernel takes keys as ``[tokens, Hkv, D]``, and a row of the cache is ``[Hkv, M, D]``. Strides make it fit: a
    token is D numbers from the next, a head M * D, and row b begins at token b * Hkv * M.

    Args:
        q: ``[B, H, D]``.
        k: ``[B, Hkv, M, D]``, contiguous; H is a multiple of Hkv.
        v: as ``k``.
        lengths: ``[B]`` int32, valid keys of each row.
        longest: no row has more; the kernel shares its work out by this number.
        bounds: of B rows of ``k``.

    Returns:
        ``[B, H, D]``.
    """
    batch, heads, capacity, size = k.shape
    shape = ((batch - 1) * heads * capacity + capacity, heads, size)
    keys, values = (t.as_strided(shape, (size, capacity * size, 1)) for t in (k, v))
    return flash(q, keys, values, bounds, (1, longest), lengths=lengths)


@lru_cache(maxsize=64)
def can_pack(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> bool:
    """Whether :func:`packed_attention` runs here, and right."""
    if not _fits(dtype, head_dim):
        return False

    def differs() -> Tensor:
        q, k, v = _noise((3, 5, heads, head_dim), dtype, device).unbind(0)
        bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        found = packed_attention(q, k, v, bounds, 3)
        expected = []
        for part in (slice(0, 2), slice(2, 5)):
            queries, keys, values = (t[part].transpose(0, 1).float() for t in (q, k, v))
            expected.append(F.scaled_dot_product_attention(queries, keys, values).transpose(0, 1))
        return (found - torch.cat(expected)).abs().max()

    return _holds("packed attention", device, differs)


@lru_cache(maxsize=64)
def can_read_cache(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether :func:`cached_attention` and :func:`chunk_attention` run here, and right."""
    if not _fits(dtype, head_dim):
        return False

    def differs() -> Tensor:
        k, v = _noise((2, 2, kv_heads, 130, head_dim), dtype, device).unbind(0)
        q = _noise((2, heads, 3, head_dim), dtype, device)
        lengths = (3, 129)
        counts = torch.tensor(lengths, dtype=torch.int32, device=device)
        step = cached_attention(q[:, :, 2], k, v, counts, 130, CacheBounds.of(2, k))
        errors = []
        for row, length in enumerate(lengths):
            query, key, value = q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length]
            mask = torch.ones(3, length, dtype=torch.bool, device=device).tril(length - 3)
            expected = F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=mask, enable_gqa=heads != kv_heads
            )
            errors += [chunk_attention(query, key, value) - expected, (step[row] - expected[0, :, 2])]
        return torch.stack([error.abs().max() for error in errors]).max()

    return _holds("attention to the cache", device, differs)


def _fits(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


_TOLERANCE = 0.05
"""Of values around 1 in BF16; a wrong key or a wrong length differs by several times that."""


def _holds(what: str, device: torch.device, differs: Callable[[], Tensor]) -> bool:
    try:
        with torch.no_grad():
            difference = float(differs())
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        logger.info("no fused %s on %s: %s", what, device, " ".join(str(error).split())[:200])
        return False
    if not difference < _TOLERANCE:
        logger.warning("fused %s on %s is wrong by %.3g; it is left out, which costs time", what, device, difference)
        return False
    return True
