"""Quantised weights as kernels take them: signed integers in blocks of input channels, without zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import QuantizedLinear

LARGEST_BLOCK = 128
"""Every kernel in use takes it. Larger groups are split, with the same scale in each part."""
SMALLEST_BLOCK = 16
"""ONNX Runtime's and TensorRT's."""


@dataclass(frozen=True)
class BlockedWeight:
    """The weight of a linear layer over its input in another order, ``x[..., permutation] * input_scale``.

    ``y = x @ (values * scales).T + blocksum(x) @ offsets.T``, the scales repeated over their blocks, ``blocksum`` the
    sums of each block's channels, ``[..., G]``. The second product is what zero points come to, exactly:
    ``(q - z) s = (q - 8) s + (8 - z) s``.

    Attributes:
        values: ``[out, in]`` int8; of 4 bits they are -8 to 7.
        bits: 4 or 8.
        scales: ``[out, G]`` FP32.
        offsets: ``[out, G]`` FP32; None where they are 0.
        block_size: input channels of a block, a power of two; ``in = G * block_size``.
        permutation: ``[in]`` int64; None where the channels are in order.
        input_scale: ``[in]`` FP32, in the new order; None where it is 1.
    """

    values: Tensor
    bits: int
    scales: Tensor
    offsets: Tensor | None
    block_size: int
    permutation: Tensor | None
    input_scale: Tensor | None


def blocked(weight: QuantizedLinear, bits: int) -> BlockedWeight | None:
    """The same numbers in blocks, exactly; None where the groups do not make such blocks.

    E2M1 numbers are halves up to 6: twice them are integers, of 8 bits, and half their scales.

    Args:
        bits: of the values, where those are integers.
    """
    size = weight.group_size
    channels, groups = weight.values.shape[1], weight.scales.shape[1]
    if groups == 1 and weight.group_index is None:
        size = channels
    block = min(size & -size, LARGEST_BLOCK)  # the largest power of two that divides it
    if block < SMALLEST_BLOCK or groups * size != channels:
        return None
    permutation = None
    if weight.group_index is not None:
        if not torch.equal(weight.group_index.bincount(minlength=groups), torch.full((groups,), size)):
            return None
        permutation = weight.group_index.argsort(stable=True)
    values, scales = weight.values, weight.scales.float()
    zeros = torch.zeros(1, 1) if weight.zero_points is None else weight.zero_points.float()
    if values.dtype == torch.float8_e4m3fn:
        values, scales, bits = (values.float() * 2).to(torch.int8), scales / 2, 8
    elif values.dtype == torch.uint8:
        half = 2 ** (bits - 1)
        values, zeros = (values.to(torch.int16) - half).to(torch.int8), zeros - half
    if permutation is not None:
        values = values[:, permutation]
    scales = scales.expand(values.shape[0], -1)
    offsets = -zeros * scales if zeros.any() else None
    parts = size // block
    input_scale = None if weight.input_scale is None else weight.input_scale.float()
    return BlockedWeight(
        values.contiguous(),
        bits,
        scales.repeat_interleave(parts, 1),
        None if offsets is None else offsets.repeat_interleave(parts, 1),
        block,
        permutation,
        input_scale if input_scale is None or permutation is None else input_scale[permutation],
    )
