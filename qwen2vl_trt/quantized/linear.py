"""The one form of a quantised weight, in whatever format it was stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Numbers = Literal["int4", "int8", "nvfp4"]
"""That weights are rounded to, as ``--precision`` names them."""
NVFP4_BLOCK = 16
"""Input channels of a scale."""
E2M1_MAX = 6


@dataclass(frozen=True)
class QuantizedLinear:
    """The weight of a linear layer: ``(values - zero_points) * scales * input_scale``, ``[out, in]``.

    Attributes:
        values: ``[out, in]`` int8, uint8 or float8_e4m3fn; a number of 4 bits takes a byte too.
        scales: ``[out, G]``, one a group of input channels, or ``[1, 1]`` of the whole weight.
        zero_points: as ``scales``; None where they are 0.
        group_size: input channels of a group; the last group may have fewer.
        group_index: ``[in]`` int64, the group of each input channel where they are not in order.
        input_scale: ``[in]``, what the input of the layer is multiplied by.
        global_scale: of NVFP4: what the scales have been multiplied by, which are E4M3 without it.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    group_size: int
    group_index: Tensor | None = None
    input_scale: Tensor | None = None
    global_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight, ``[out, in]`` FP32."""
        weight = self.values.contiguous().float()
        channels, groups = weight.shape[1], self.scales.shape[1]
        index: slice | Tensor = slice(None)
        if self.group_index is None and channels == groups * self.group_size:
            blocks = weight.view(-1, groups, self.group_size)  # broadcasting is several times faster than an index
        else:
            blocks = weight[..., None]
            index = torch.arange(channels) // self.group_size if self.group_index is None else self.group_index
        if self.zero_points is not None:
            blocks -= self.zero_points.float()[:, index, None]
        blocks *= self.scales.float()[:, index, None]
        if self.input_scale is not None:
            weight *= self.input_scale.float()
        return weight


@dataclass(frozen=True)
class PackedWeight:
    """A weight that other tensors of a checkpoint hold.

    Attributes:
        shape: ``(out, in)``.
        dtype: that it is rounded to when it is dequantised.
        numbers: what a layer can compute with; None where it must be dequantised.
        read: reads it as it is stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    numbers: Numbers | None
    read: Callable[[], QuantizedLinear]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of 4 or 8 bits out of larger ones, the lowest bits first: ``[n, m]`` to ``[n, k * m]`` uint8."""
    octets = packed.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """The other way: ``[n, m]`` uint8 to ``[n, m * bits / 8]`` uint8."""
    return numbers if bits == 8 else numbers[:, ::2] | numbers[:, 1::2] << 4


def e2m1(codes: Tensor) -> Tensor:
    """Numbers of 4 bits, uint8 each (sign, two bits of exponent, one of mantissa), as E4M3, which has all of them."""
    numbers = torch.tensor([sign * number for sign in (1, -1) for number in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8)[codes.int()].view(torch.float8_e4m3fn)


def e2m1_codes(values: Tensor) -> Tensor:
    """The other way: the 4 bits of each, uint8."""
    codes = torch.arange(16, dtype=torch.uint8)
    code_of = torch.zeros(256, dtype=torch.uint8)
    code_of[e2m1(codes).view(torch.uint8).int()] = codes
    return code_of[values.view(torch.uint8).int()]
