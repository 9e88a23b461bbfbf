"""Operators that torch lacks: attention over a static cache, FP8, and weights in blocks.

Eagerly they are plain PyTorch, in place on a cache. Under ``torch.export`` each is one node, which export/operators.py
translates to a standard ONNX operator.

Letters: B batch, S new tokens, M cache capacity, H query heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

FP8_MAX = 448.0  # of E4M3
FP8_ALIGNMENT = 16
"""``torch._scaled_mm`` needs both sides of a weight to be multiples of it."""


def update_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Write ``new [B, Hkv, S, D]`` into ``cache [B, Hkv, M, D]``, row b from ``start[b]`` on, in place; return it."""
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.update_cache(cache, new, start)
    rows = torch.arange(new.shape[0], device=cache.device)[:, None]
    positions = start[:, None] + torch.arange(new.shape[2], device=cache.device)
    cache.transpose(1, 2)[rows, positions] = new.transpose(1, 2)
    return cache


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """Attention of ``q [B, H, S, D]`` to the first keys of ``k``, ``v [B, Hkv, M, D]``.

    Args:
        lengths: ``[B]`` int64, valid keys of each row, at least 1 (at least S where causal).
        causal: lower-right: query i of S sees keys up to ``length - S + i``.
    """
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.ragged_attention(q, k, v, lengths, causal)
    if q.device.type == "cpu" and not torch.is_grad_enabled():
        return _attention_by_length(q, k, v, lengths, causal)
    return _masked_attention(q, k, v, lengths, causal)


def full_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """:func:`ragged_attention` with all N keys valid: q ``[B, H, S, D]``, k and v ``[B, Hkv, N, D]``."""
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
    """Rotary embedding of ``x [B, H, S, D]``, halves paired, in FP32; ``cos``, ``sin`` are ``[B, S, D / 2]`` FP32."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.rotary_embedding(x.float(), cos, sin).type_as(x)
    return rotate_eager(x, cos, sin)


def rotate_eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate` under ``torch.compile``, where PyTorch 2.11's ``is_exporting`` is true."""
    cos = torch.cat((cos, cos), dim=-1)[:, :, None]  # [B, S, 1, D]
    sin = torch.cat((-sin, sin), dim=-1)[:, :, None]
    y = x.transpose(1, 2).float()  # [B, S, H, D], as it lies in memory; mixed types would not vectorise on a CPU
    y = (y * cos).addcmul_(y.roll(x.shape[-1] // 2, dims=-1), sin)
    return y.type_as(x).transpose(1, 2)


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in E4M3, nearest, ties to even, saturating, as QuantizeLinear."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` quantised to E4M3 and dequantised to its own type."""
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.round_to_fp8(x, scale)
    return dequantize_fp8(quantize_fp8(x, scale), scale, x)


def dequantize_fp8(values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """``values * scale``, in the type of ``like``."""
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.dequantize_fp8(values, scale, like)
    return (values.float() * scale).to(like.dtype)


def dequantize_blocks(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """``values [in, out]``, whole numbers, times ``scales [in / block_size, out]``, in the type of the scales.

    A ``block_size`` of 0: the scales are ``[out]``.
    """
    if torch.compiler.is_exporting():
        return torch.ops.qwen2vl_trt.dequantize_blocks(values, scales, block_size)
    return values.to(scales.dtype) * (scales.repeat_interleave(block_size, 0) if block_size else scales)


def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer over E4M3 numbers; see :class:`~qwen2vl_trt.layers.FP8Linear`.

    By ``torch._scaled_mm`` where the GPU has it. Elsewhere by a plain product of the same numbers, which are exact in
    BF16 and FP32: equal up to the order of sums and one rounding. ``x [..., in]`` and ``weight [out, in]`` E4M3 give
    ``[..., out]`` in the type of ``x``.
    """
    values = quantize_fp8(x, input_scale)
    if fits_scaled_mm(weight, x.dtype, x.device):
        return scaled_mm(values, weight, weight_scale, input_scale, bias, x.dtype)
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # unscaled, the products overflow FP16
    return rescale(F.linear(values.to(wide), weight.to(wide)), weight_scale * input_scale, bias).type_as(x)


def scaled_mm(
    values: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`fp8_linear` of an input in E4M3 already, ``[..., in]``: ``[..., out]`` of a ``dtype``."""
    # The second operand must be column-major, as the weight's transpose is. Fast accumulation: on Hopper, sums stay in
    # the tensor cores' 14 bits, as in vLLM's kernels, and are not moved to FP32 every few products, which takes time.
    y = torch._scaled_mm(
        values.flatten(0, -2),
        weight.t(),
        input_scale,
        weight_scale,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return y.unflatten(0, values.shape[:-1])


def fits_scaled_mm(weight: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`scaled_mm` takes a weight ``[out, in]`` for activations of a type on a device."""
    return dtype != torch.float32 and not any(n % FP8_ALIGNMENT for n in weight.shape) and has_scaled_mm(device)


@lru_cache(maxsize=16)
def has_scaled_mm(device: torch.device) -> bool:
    """Whether it is a GPU with FP8 products: NVIDIA's from Ada (8.9) on. Warns of a GPU that has none."""
    if device.type != "cuda":
        return False
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 9):
        logger.warning(
            "%s has no FP8 products (NVIDIA's have from compute capability 8.9 on): FP8 layers are dequantised in every"
            " call, which takes more time than BF16",
            device,
        )
        return False
    missing = missing_arguments("_scaled_mm", "scale_a", "scale_b", "bias", "out_dtype", "use_fast_accum")
    if missing:
        logger.warning("%s: FP8 layers are dequantised in every call, which takes more time than BF16", missing)
    return not missing


def missing_arguments(operator: str, *arguments: str) -> str | None:
    """What this PyTorch lacks of a private operator ``aten::operator``, in words; None if nothing."""
    found = getattr(torch.ops.aten, operator, None)
    if found is None:
        return f"PyTorch {torch.__version__} has no operator aten::{operator}"
    lacks = set(arguments) - {argument.name for argument in found.default._schema.arguments}
    if lacks:
        return f"PyTorch {torch.__version__}'s aten::{operator} takes no {', '.join(sorted(lacks))}"
    return None


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
    """Rows of equal length together, over that length alone: cheaper than a mask on a CPU."""
    distinct = lengths.unique().tolist()
    if len(distinct) == 1:
        return full_attention(q, k[:, :, : distinct[0]], v[:, :, : distinct[0]], causal)
    out = torch.empty_like(q)
    for length in distinct:
        rows = (lengths == length).nonzero().squeeze(1)
        # Queries beyond a vision window's length are padding; attending with them as well is harmless.
        out[rows] = full_attention(q[rows], k[rows, :, :length], v[rows, :, :length], causal)
    return out


def _copied_cache(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return update_cache(cache.clone(), new, start)


_OPERATORS = [
    torch.library.custom_op(f"qwen2vl_trt::{name}", function, mutates_args=())
    for name, function in (
        ("update_cache", _copied_cache),
        ("ragged_attention", _masked_attention),
        ("round_to_fp8", round_to_fp8),
        ("dequantize_fp8", dequantize_fp8),
        ("dequantize_blocks", dequantize_blocks),
    )
]
for _operator in _OPERATORS[:3]:
    _operator.register_fake(lambda x, *_: torch.empty_like(x))
_OPERATORS[3].register_fake(lambda values, scale, like: torch.empty_like(values, dtype=like.dtype))
_OPERATORS[4].register_fake(lambda values, scales, block_size: torch.empty_like(values, dtype=scales.dtype))
