"""Linear layers over weights of 4 and 8 bits, which are never dequantised whole.

On a CPU, weights of 4 bits go through PyTorch's ``aten::_weight_int4pack_mm_for_cpu``, in BF16 whatever the type of the
activations, for its other types are plain loops. Its time grows with each row: from some rows on, a tile of the weight
after the other is dequantised. Weights of 8 bits go through oneDNN's products of bytes, exactly: an activation is two
numbers of 7 bits there (:func:`split`). On a GPU, 4 bits go through ``aten::_weight_int4pack_mm``. All others are
dequantised tile by tile in each call. These operators are private: on a CPU each is tried on a small layer before.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2vl_trt.ops import missing_arguments
from qwen2vl_trt.quantized.blocks import BlockedWeight, blocked
from qwen2vl_trt.quantized.linear import PackedWeight
from qwen2vl_trt.quantized.rounding import round_to_nearest

from .common import shortest_seconds

logger = logging.getLogger(__name__)

_TILE = 256
"""Outputs that are dequantised at once: of 2,048 channels in FP32 they take 2 MiB."""
_ROWS = 256
"""Rows that products of bytes take at once, whose results are FP32 and twice as many."""
_SMALLEST_PART = 128
"""Input channels of a product of bytes; smaller blocks cost more in calls than they save."""
_INT4_GROUPS = (32, 64, 128, 256)
_INT4_OUTPUTS = 64
_INNER_K_TILES = 8
_CPU = torch.device("cpu")
_FEW, _WIDTH = 8, 2048
_HALF, _LARGEST = 64, 63 * 64 + 31
_TOLERANCE = 0.02  # of the largest result: inputs, scales and results rounded to BF16


@cache
def int4_layout() -> tuple[int, bool] | None:
    """How ``_convert_weight_to_int4pack_for_cpu`` packs here, ``[out / width, in, width / 2]`` bytes: the width, and
    whether the upper four bits hold the second half of the outputs, else every other one; None where none of these."""
    numbers = torch.randint(16, (_INT4_OUTPUTS, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 2)
    except (AttributeError, RuntimeError, TypeError):
        return None
    for width in (64, 32):
        part = packed.view(-1, 32, width // 2)
        for halves in (True, False):
            pair = part & 15, part >> 4
            found = torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(2)
            if torch.equal(found.transpose(1, 2).flatten(0, 1), numbers):
                return width, halves
    return None


@cache
def int4_rows() -> int:
    """Most rows for which the product of 4 bits takes less time than dequantising, 0 where it is not right here.

    Computes one small layer both ways, some milliseconds, once a process.
    """
    if int4_layout() is None:
        return 0
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (_TILE, _WIDTH), generator=draw, dtype=torch.int8)
    layer = Int4Linear(BlockedWeight(values, 4, torch.ones(_TILE, _WIDTH // 128), None, 128, None, None))
    x = torch.randn(_FEW, _WIDTH, generator=draw)
    try:
        if not _close(layer.packed_product(x), x @ values.float().T):
            logger.warning("products of 4 bits are wrong here; weights are dequantised in every call, which costs time")
            return 0
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("no products of 4 bits here; weights are dequantised in every call: %s", _reason(error))
        return 0
    packed, dequantized = (
        shortest_seconds(partial(way, x)) for way in (layer.packed_product, layer.dequantized_product)
    )
    rows = int(_FEW * dequantized / packed)
    logger.debug(
        "products of 4 bits up to %d rows (%d in %.2g s, dequantised in %.2g s)", rows, _FEW, packed, dequantized
    )
    return rows


@cache
def has_int8() -> bool:
    """Whether oneDNN's products of bytes are right here: tried once a process, on the largest sums."""
    values = torch.full((_INT4_OUTPUTS, _SMALLEST_PART), -128, dtype=torch.int8)
    values[::2] = 127
    layer = Int8Linear(BlockedWeight(values, 8, torch.ones(_INT4_OUTPUTS, 1), None, _SMALLEST_PART, None, None))
    x = torch.linspace(-1, 1, 4)[:, None].expand(-1, _SMALLEST_PART)
    try:
        if _close(layer(x), x @ values.float().T):
            return True
        logger.warning("products of bytes are wrong here; weights of 8 bits are dequantised in every call")
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("no products of bytes here; weights of 8 bits are dequantised in every call: %s", _reason(error))
    return False


@cache
def has_cuda_int4() -> bool:
    """Whether this PyTorch has the product of 4 bits on a GPU."""
    missing = missing_arguments("_convert_weight_to_int4pack", "innerKTiles") or missing_arguments(
        "_weight_int4pack_mm", "qGroupSize", "qScaleAndZeros"
    )
    if missing:
        logger.warning("%s: weights of 4 bits are dequantised in every call, which takes more time than BF16", missing)
    return not missing


class Int4Linear(nn.Module):
    """``x [n, in]`` times a weight of 4 bits, on a CPU; ``offsets`` are part of it."""

    def __init__(self, weight: BlockedWeight) -> None:
        super().__init__()
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # of whole blocks of outputs, one like another
        self.weight = nn.Buffer(torch.cat([pack(values.int().add_(8), 2) for values in weight.values.split(_TILE)]))
        self.scales_and_zeros = nn.Buffer(_scales_and_zeros(weight))
        self.group_size, self.zeros = weight.block_size, weight.offsets is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.packed_product(x) if len(x) <= int4_rows() else self.dequantized_product(x)

    def packed_product(self, x: Tensor) -> Tensor:
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu
        return mm(x.bfloat16(), self.weight, self.group_size, self.scales_and_zeros).type_as(x)

    def dequantized_product(self, x: Tensor) -> Tensor:
        """The same through tiles of the transposed weight, in the type of ``x``."""
        layout = int4_layout()
        assert layout is not None
        width, halves = layout
        channels, half = x.shape[1], width // 2
        packed = self.weight.view(-1, channels, half)
        scales, zeros = (each.float() for each in self.scales_and_zeros.unbind(-1))  # [G, out]
        y, first = x.new_empty(len(x), len(packed) * width), 0
        for part in packed.split(_TILE // width):
            weight = scales.new_empty(channels, len(part), width)
            low, high = (weight[..., :half], weight[..., half:]) if halves else (weight[..., ::2], weight[..., 1::2])
            low.copy_((part & 15).transpose(0, 1))
            high.copy_((part >> 4).transpose(0, 1))
            outputs = slice(first, first + len(part) * width)
            groups = weight.view(len(scales), self.group_size, -1)
            groups.sub_(8).mul_(scales[:, None, outputs])
            if self.zeros:
                groups.add_(zeros[:, None, outputs])
            y[:, outputs] = x @ weight.flatten(1).type_as(x)
            first = outputs.stop
        return y


class CudaInt4Linear(nn.Module):
    """:class:`Int4Linear` on a GPU, for activations in BF16."""

    def __init__(self, weight: BlockedWeight) -> None:
        super().__init__()
        numbers = (weight.values + 8).to(torch.uint8)
        pairs = numbers[:, ::2] << 4 | numbers[:, 1::2]
        self.weight = nn.Buffer(torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_K_TILES))
        self.scales_and_zeros = nn.Buffer(_scales_and_zeros(weight))
        self.group_size = weight.block_size

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, self.weight, self.group_size, self.scales_and_zeros)


class Int8Linear(nn.Module):
    """``x [n, in]`` times a weight of 8 bits with a scale a channel, or a block of 128 input channels, on a CPU."""

    def __init__(self, weight: BlockedWeight) -> None:
        super().__init__()
        part = _part(weight)
        pack = torch.ops.onednn.qlinear_prepack
        # Opaque to torch: neither a parameter nor a buffer can hold this layout.
        self.parts = [pack(values.contiguous(), None) for values in weight.values.split(part, 1)]
        self.scales = nn.Buffer(weight.scales[:, :: part // weight.block_size].t().contiguous())  # [parts, out]
        self.zeros = nn.Buffer(torch.zeros(len(weight.values), dtype=torch.int32))
        self.size = part

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._product(rows) for rows in x.split(_ROWS)]) if len(x) > _ROWS else self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        both, unit = split(x)
        linear = torch.ops.onednn.qlinear_pointwise
        y: Tensor | None = None
        for part, scales, inputs in zip(self.parts, self.scales, both.split(self.size, 1)):
            before = inputs.contiguous(), 1.0, _HALF, part, scales, self.zeros
            after = None, 1.0, 0, torch.float32
            if y is None:
                y = linear(*before, *after, "none", [], "")
            else:
                y = linear.binary(*before, y, *after, 1.0, 0, "sum", 1.0, "none", [], "")
        assert y is not None
        high, low = y.chunk(2)
        return high.mul_(_HALF).add_(low).mul_(unit).type_as(x)


class DequantizedLinear(nn.Module):
    """``x [n, in]`` times any such weight, dequantised tile by tile in every call."""

    def __init__(self, weight: BlockedWeight) -> None:
        super().__init__()
        self.values, self.scales = nn.Buffer(weight.values), nn.Buffer(weight.scales)
        self.block_size = weight.block_size

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), len(self.values))
        for first in range(0, len(self.values), _TILE):
            outputs = slice(first, first + _TILE)
            weight = self.values[outputs].float()  # BF16 is several times slower here
            weight.view(len(weight), -1, self.block_size).mul_(self.scales[outputs, :, None])
            y[:, outputs] = F.linear(x, weight.type_as(x))
        return y


class WeightOnlyLinear(nn.Module):
    """A linear layer over a :class:`~qwen2vl_trt.quantized.blocks.BlockedWeight`.

    Args:
        weight: on the device on which it computes.
        bias: of the layer.
        dtype: of activations.
    """

    offsets: Tensor | None
    permutation: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: BlockedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.product = _product(weight, dtype)
        self.block_size = weight.block_size
        folded = isinstance(self.product, (Int4Linear, CudaInt4Linear))
        input_scale = None if weight.input_scale is None else weight.input_scale.to(dtype)
        self.register_buffer("offsets", None if folded else weight.offsets)
        self.register_buffer("permutation", weight.permutation)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows = x.flatten(0, -2)
        if self.permutation is not None:
            rows = rows[:, self.permutation]
        if self.input_scale is not None:
            rows = rows * self.input_scale
        y = self.product(rows)
        if self.offsets is not None:
            sums = rows.float().unflatten(1, (-1, self.block_size)).sum(2)
            y = torch.addmm(y.float(), sums, self.offsets.t()).type_as(y)
        if self.bias is not None:
            y += self.bias
        return y.unflatten(0, x.shape[:-1])


def weight_only(
    linear: nn.Linear, packed: PackedWeight, device: torch.device, dtype: torch.dtype
) -> WeightOnlyLinear | None:
    """The layer of a quantised weight; None where it must be dequantised: FP8, and groups that make no blocks.

    Args:
        linear: the plain layer, of which the bias alone is loaded.
        packed: its weight.
        device: on which it computes.
        dtype: of activations.
    """
    if packed.numbers is None:
        return None
    return _layer(linear, blocked(packed.read(), 4 if packed.numbers == "int4" else 8), device, dtype)


def round_head(linear: nn.Linear, dtype: torch.dtype) -> WeightOnlyLinear | None:
    """A plain layer on a CPU in 8 bits, rounded to nearest, a scale a channel; None where its width makes no blocks.

    Of 16 bits, ``lm_head`` would be most of what a step over weights of 4 bits reads.
    """
    weight = linear.weight.detach().to(dtype)
    return _layer(linear, blocked(round_to_nearest(weight, 8, weight.shape[1]), 8), _CPU, dtype)


def _layer(
    linear: nn.Linear, weight: BlockedWeight | None, device: torch.device, dtype: torch.dtype
) -> WeightOnlyLinear | None:
    if weight is None:
        return None
    tensors: Any = {name: value.to(device) for name, value in vars(weight).items() if isinstance(value, Tensor)}
    bias = None if linear.bias is None else linear.bias.detach()
    return WeightOnlyLinear(replace(weight, **tensors), bias, dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as two numbers of 7 bits each, ``x = (64 (high - 64) + low - 64) * unit``.

    To 1/8126 of the largest of a row. Bytes up to 127: where a CPU multiplies bytes by pairs whose sums saturate at
    2**15 (AVX2, AVX-512 without VNNI), two products of these and -128 do not.

    Args:
        x: ``[n, in]``.

    Returns:
        ``[2 n, in]`` uint8, the high numbers and then the low ones, and the unit of each row, ``[n, 1]`` FP32.
    """
    x = x.float()
    unit = x.abs().amax(1, keepdim=True).div_(_LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    numbers = (x / unit).round_()
    high = (numbers / _HALF).round_()
    low = numbers.addcmul_(high, numbers.new_tensor(-_HALF))
    return torch.cat((high, low)).add_(_HALF).to(torch.uint8), unit


def _product(weight: BlockedWeight, dtype: torch.dtype) -> nn.Module:
    out, channels = weight.values.shape
    groups = weight.bits == 4 and weight.block_size in _INT4_GROUPS
    if weight.values.device.type == "cuda":
        fits = dtype == torch.bfloat16 and not out % 8 and not channels % (16 * _INNER_K_TILES)
        return CudaInt4Linear(weight) if groups and fits and has_cuda_int4() else DequantizedLinear(weight)
    if groups and not out % _INT4_OUTPUTS and int4_rows() > 0:
        return Int4Linear(weight)
    if weight.bits == 8 and _part(weight) >= _SMALLEST_PART and has_int8():
        return Int8Linear(weight)
    return DequantizedLinear(weight)


def _part(weight: BlockedWeight) -> int:
    """Input channels with one scale: all of them, or a block."""
    return weight.values.shape[1] if bool((weight.scales == weight.scales[:, :1]).all()) else weight.block_size


def _scales_and_zeros(weight: BlockedWeight) -> Tensor:
    """``[G, out, 2]`` BF16: a weight is ``(number - 8) * scale + zero``."""
    zeros = torch.zeros_like(weight.scales) if weight.offsets is None else weight.offsets
    return torch.stack((weight.scales, zeros), -1).transpose(0, 1).contiguous().bfloat16()


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
