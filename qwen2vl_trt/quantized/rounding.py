"""Weights rounded to nearest integers, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import QuantizedLinear


def round_to_nearest(weight: Tensor, bits: int, block: int) -> QuantizedLinear:
    """Symmetric, a scale a block: the largest magnitude over half the range, 7.5 or 127.5.

    So compressed-tensors has it: ``quantization/utils/helpers.py``, ``calculate_qparams`` of its release 0.20.

    Args:
        weight: ``[out, in]`` of floating point.
        bits: 4 or 8; the numbers are signed, -8 to 7 or -128 to 127.
        block: input channels of a scale; ``in`` is a multiple of it.
    """
    groups = weight.float().unflatten(1, (-1, block))
    half = 2 ** (bits - 1)
    scales = (groups.abs().amax(2) / (half - 0.5)).clamp_(min=torch.finfo(torch.float32).eps)
    values = (groups / scales[..., None]).round_().clamp_(-half, half - 1).to(torch.int8)
    return QuantizedLinear(values.flatten(1), scales, None, block)
