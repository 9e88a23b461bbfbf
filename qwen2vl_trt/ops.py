"""The operators that torch lacks: for a decoder with a static cache, and for FP8. Most have two forms.

Eagerly they are plain PyTorch and, on a cache, work in place. Under ``torch.export`` they become one node each,
which ``export/`` translates to standard ONNX operators (``TensorScatter``, ``Attention``, ``RotaryEmbedding``,
``QuantizeLinear`` and ``DequantizeLinear``).

Letters: B batch, S new tokens, M cache capacity, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0
"""The largest E4M3 number."""

FP8_ALIGNMENT = 16
"""Both sides of a weight must be multiples of it for a GPU's FP8 product."""


def update_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Write new keys or values into their rows of the cache, in place.

    Args:
        cache: ``[B, Hkv, M, D]``.
        new: ``[B, Hkv, S, D]``.
        start: ``[B]`` int64, first position written in each row.

    Returns:
        The updated cache (the same tensor when run eagerly).
    """
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.update_cache(cache, new, start)
    rows = torch.arange(new.shape[0], device=cache.device)[:, None]
    positions = start[:, None] + torch.arange(new.shape[2], device=cache.device)
    cache.transpose(1, 2)[rows, positions] = new.transpose(1, 2)
    return cache


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """Attention over keys of which only a prefix is valid; causal means lower-right: the last query sees all of it.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, Hkv, M, D]``; H is a multiple of Hkv.
        v: as ``k``.
        lengths: ``[B]`` int64, valid keys of each row, at least 1 (at least S where causal).
        causal: query i of S sees keys up to ``length - S + i``.

    Returns:
        ``[B, H, S, D]``.
    """
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.ragged_attention(q, k, v, lengths, causal)
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        return _attention_by_length(q, k, v, lengths, causal)
    return _masked_attention(q, k, v, lengths, causal)


def full_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention over keys that are all valid; causal is lower-right, as in :func:`ragged_attention`.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, Hkv, N, D]``; H is a multiple of Hkv.
        v: as ``k``.
        causal: query i of S sees keys up to ``N - S + i``.

    Returns:
        ``[B, H, S, D]``.
    """
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if queries == 1:
        # The query heads that share a key-value head become its queries: each key is read once, not once a head.
        shared = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(shared, k, v).reshape(q.shape)
    if not causal:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding over the whole head, halves paired (not interleaved), computed in FP32.

    Args:
        x: ``[B, H, S, D]``.
        cos: ``[B, S, D / 2]`` FP32.
        sin: as ``cos``.

    Returns:
        ``[B, H, S, D]`` in the type of ``x``.
    """
    if torch.compiler.is_exporting():
        return torch.onnx.ops.rotary_embedding(x.float(), cos, sin).type_as(x)
    return rotate_unexported(x, cos, sin)


def rotate_unexported(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate` for ``torch.compile``, under which PyTorch 2.11 says that it is exporting."""
    cos = torch.cat((cos, cos), dim=-1)[:, :, None]  # [B, S, 1, D]
    sin = torch.cat((-sin, sin), dim=-1)[:, :, None]
    y = x.transpose(1, 2).float()  # [B, S, H, D], as it lies in memory; mixed types would not vectorise on a CPU
    y = (y * cos).addcmul_(y.roll(x.shape[-1] // 2, dims=-1), sin)
    return y.type_as(x).transpose(1, 2)


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in E4M3, to the nearest, ties to even; beyond its range it saturates, as QuantizeLinear does."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest multiples of ``scale`` by an E4M3 number, in the type of ``x``."""
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.round_to_fp8(x, scale)
    return dequantize_fp8(quantize_fp8(x, scale), scale, x)


def dequantize_fp8(values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """``values * scale``, in the type of ``like``."""
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.dequantize_fp8(values, scale, like)
    return (values.float() * scale).to(like.dtype)


def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer over E4M3 numbers; see :class:`~qwen2vl_trt.layers.FP8Linear`.

    A GPU with FP8 products computes it so (``torch._scaled_mm``). Elsewhere, E4M3 numbers being exact in BF16 and FP32
    and so their products, a plain matrix product gives the same up to the order of its sums and one rounding.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]`` E4M3.
        weight_scale: one FP32 number.
        input_scale: likewise.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` in the type of ``x``.
    """
    values = quantize_fp8(x, input_scale)
    if multiplies_fp8(weight, x.dtype, x.device):
        return fp8_product(values, weight, weight_scale, input_scale, bias, x.dtype)
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # unscaled, the products overflow FP16
    return rescale(F.linear(values.to(wide), weight.to(wide)), weight_scale * input_scale, bias).type_as(x)


def fp8_product(
    values: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What :func:`fp8_linear` gives for its input in E4M3 already, ``[..., in]``: ``[..., out]`` of a ``dtype``."""
    y = torch._scaled_mm(
        values.flatten(0, -2), weight.t(), input_scale, weight_scale, bias=bias, out_dtype=dtype
    )  # the second operand column by column, as its transpose lies
    return y.unflatten(0, values.shape[:-1])


def multiplies_fp8(weight: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`fp8_product` takes a weight ``[out, in]`` on a device, for activations of a type."""
    return dtype != torch.float32 and not any(n % FP8_ALIGNMENT for n in weight.shape) and has_fp8_product(device)


@lru_cache(maxsize=16)
def has_fp8_product(device: torch.device) -> bool:
    """Whether it is a GPU that multiplies FP8 numbers: NVIDIA's from Ada (8.9) on."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def rescale(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y * scale + bias`` in FP32, rounded once to the type of ``y``."""
    scaled = y.float() * scale
    return (scaled if bias is None else scaled.add_(bias)).type_as(y)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    last = lengths[:, None] - 1
    if causal:
        last = last - torch.arange(queries - 1, -1, -1, device=q.device)
    mask = torch.arange(keys, device=q.device) <= last[:, :, None]  # [B, S or 1, M]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=q.shape[1] != k.shape[1])


def _attention_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """Rows of equal length attend together over just that length; on a CPU this costs less than a mask."""
    distinct = lengths.unique().tolist()
    if len(distinct) == 1:
        return full_attention(q, k[:, :, : distinct[0]], v[:, :, : distinct[0]], causal)
    out = torch.empty_like(q)
    for length in distinct:
        rows = (lengths == length).nonzero().squeeze(1)
        # Queries beyond a vision window's length are padding; attending with them as well is harmless.
        out[rows] = full_attention(q[rows], k[rows, :, :length], v[rows, :, :length], causal)
    return out


@torch.library.custom_op("qwen2vl_trt::update_cache", mutates_args=())
def _update_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return update_cache(cache.clone(), new, start)


@_update_cache.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("qwen2vl_trt::ragged_attention", mutates_args=())
def _ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    return _masked_attention(q, k, v, lengths, causal)


@_ragged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("qwen2vl_trt::round_to_fp8", mutates_args=())
def _round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return round_to_fp8(x, scale)


@_round_to_fp8.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qwen2vl_trt::dequantize_fp8", mutates_args=())
def _dequantize_fp8(values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    return dequantize_fp8(values, scale, like)


@_dequantize_fp8.register_fake
def _(values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(values, dtype=like.dtype)
