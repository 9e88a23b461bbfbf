"""GPTQ as AutoGPTQ and GPTQModel store it. Source: ``gptqmodel/nn_modules/qlinear`` and ``gptqmodel/utils/model.py``.

``qweight [in * bits / 32, out]`` holds input channels in an int32, the lowest bits first; ``qzeros
[G, out * bits / 32]`` output channels likewise; ``scales [G, out]``; ``g_idx [in]`` is the group of each input channel,
which with ``desc_act`` are in no order. ``(q - z) * s``, where ``checkpoint_format: gptq`` stores z - 1 in ``qzeros``,
``gptq_v2`` z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .linear import Numbers, QuantizedLinear, unpack
from .stored import FLOATS, Entry, Layer, Settings


@dataclass(frozen=True)
class GPTQ:
    """See :class:`qwen2vl_trt.quantized.stored.Format`.

    Attributes:
        bits: of a number, 4 or 8.
        group_size: input channels of a group; -1 is all of them.
        zero_offset: what is to be added to a stored zero point.
        desc_act: the groups are in no order, so ``g_idx`` must be there.
    """

    method = "GPTQ"
    leaves = ("qweight", "qzeros", "scales", "g_idx")

    bits: int
    group_size: int
    zero_offset: int
    desc_act: bool

    @classmethod
    def of(cls, settings: Settings) -> GPTQ:
        """Raises CheckpointError: a setting that is not read."""
        bits = settings.choice("bits", (4, 8))
        name = "checkpoint_format" if "checkpoint_format" in settings.raw else "format"
        version = settings.choice(name, ("gptq", "gptq_v2"), "gptq")
        desc_act = settings.choice("desc_act", (False, True), False)
        return cls(bits, settings.group_size(128), int(version == "gptq"), desc_act)

    def is_quantized(self, entries: Mapping[str, Entry]) -> bool:
        return "qweight" in entries

    def shape(self, layer: Layer) -> tuple[int, int]:
        packed, out = layer.matrix("qweight", torch.int32)
        channels = packed * 32 // self.bits
        groups = math.ceil(channels / self._size(channels))
        layer.check("scales", FLOATS, (groups, out))
        layer.check("qzeros", (torch.int32,), (groups, out * self.bits // 32))
        if self.desc_act or "g_idx" in layer.entries:
            layer.check("g_idx", (torch.int32, torch.int64), (channels,))
        return out, channels

    def numbers(self, layer: Layer) -> Numbers:
        return "int4" if self.bits == 4 else "int8"

    def read(self, layer: Layer) -> QuantizedLinear:
        values, scales = unpack(layer.load("qweight").T, self.bits), layer.load("scales").T
        # Modulo: -1 of a zero point of 0 was stored as the largest number.
        zeros = unpack(layer.load("qzeros"), self.bits).T + self.zero_offset & 2**self.bits - 1
        size = self._size(values.shape[1])
        return QuantizedLinear(values, scales, zeros, size, layer.group_index("g_idx", scales.shape[1], size))

    def _size(self, channels: int) -> int:
        return channels if self.group_size == -1 else self.group_size
