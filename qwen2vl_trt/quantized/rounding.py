"""Weights rounded to the nearest numbers of 4 and 8 bits, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import E2M1_MAX, NVFP4_BLOCK, QuantizedLinear

_E4M3_MAX, _E4M3_MIN = 448, 2**-9  # the smallest positive one
_ROWS = 512  # that are in FP32 at a time: lm_head would take several times its size
_TINY = 2.0**-100  # weights of zeros alone have a scale too


def round_to_nearest(
    weight: Tensor, bits: int, block: int, scale_dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    """Symmetric, a scale a block: the largest magnitude over half the range, 7.5 or 127.5.

    So compressed-tensors has it: ``quantization/utils/helpers.py``, ``calculate_qparams`` of its release 0.20.

    Args:
        weight: ``[out, in]`` of floating point.
        bits: 4 or 8; the numbers are signed, -8 to 7 or -128 to 127.
        block: input channels of a scale; ``in`` is a multiple of it.
        scale_dtype: that scales are rounded to before the numbers are; they come in FP32.
    """
    half, least = 2 ** (bits - 1), torch.finfo(torch.float32).eps
    values = torch.empty_like(weight, dtype=torch.int8)
    scales = weight.new_empty(len(weight), weight.shape[1] // block, dtype=torch.float32)
    for rows, rounded, scale in zip(weight.split(_ROWS), values.split(_ROWS), scales.split(_ROWS)):
        groups = rows.float().unflatten(1, (-1, block))
        scale.copy_((groups.abs().amax(2) / (half - 0.5)).to(scale_dtype)).clamp_(min=least)
        rounded.copy_((groups / scale[..., None]).round_().clamp_(-half, half - 1).flatten(1))
    return QuantizedLinear(values, scales, None, block)


def nvfp4_global_scale(largest: Tensor) -> Tensor:
    """What scales are multiplied by before they are rounded to E4M3, ``[]`` FP32.

    Args:
        largest: the largest magnitude of the weights, ``[]``.
    """
    return E2M1_MAX * _E4M3_MAX / largest.float().clamp(min=_TINY)


def round_to_nvfp4(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 numbers in blocks of 16, ties to even, with E4M3 scales: ``numbers * scales / global_scale``.

    Args:
        weight: ``[out, in]`` of floating point; ``in`` is a multiple of 16.
        global_scale: see :func:`nvfp4_global_scale`.

    Returns:
        Codes ``[out, in]`` uint8 (:func:`qwen2vl_trt.quantized.linear.e2m1`), and scales ``[out, in / 16]`` E4M3.
    """
    groups = weight.float().unflatten(1, (-1, NVFP4_BLOCK))
    scales = (groups.abs().amax(2) / E2M1_MAX * global_scale).clamp_(_E4M3_MIN, _E4M3_MAX).to(torch.float8_e4m3fn)
    numbers = groups / (scales.float() / global_scale)[..., None]
    sizes = numbers.abs().clamp_(max=E2M1_MAX)
    doublings = (sizes >= 2).to(torch.uint8) + (sizes >= 4).to(torch.uint8)  # the step is 0.5, from 2 on 1, from 4 on 2
    codes = torch.ldexp(sizes, 1 - doublings.int()).round_().to(torch.uint8) + 2 * doublings
    return (codes | numbers.signbit().to(torch.uint8) << 3).flatten(1), scales
