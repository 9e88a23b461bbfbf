"""AutoAWQ's format, ``version: gemm``: what Qwen publishes. Source: ``awq/modules/linear/gemm.py`` of AutoAWQ 0.2.

``qweight [in, out / 8]`` and ``qzeros [G, out / 8]`` hold 8 output channels in an int32, ``scales [G, out]`` are FP16;
``(q - z) * s``. Nibble i of a word, from the lowest on, is its channel 0, 2, 4, 6, 1, 3, 5, 7 [i].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import Numbers, QuantizedLinear, unpack
from .stored import FLOATS, Entry, Layer, Settings

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the channels 0 to 7 are


@dataclass(frozen=True)
class AWQ:
    """See :class:`qwen2vl_trt.quantized.stored.Format`."""

    method = "AWQ"
    leaves = ("qweight", "qzeros", "scales")

    group_size: int

    @classmethod
    def of(cls, settings: Settings) -> AWQ:
        """Raises CheckpointError: a setting that is not read."""
        settings.choice("bits", (4,))
        settings.choice("version" if "version" in settings.raw else "format", ("gemm", "GEMM"), "gemm")
        settings.choice("zero_point", (True,), True)
        return cls(settings.group_size(128))

    def is_quantized(self, entries: Mapping[str, Entry]) -> bool:
        return "qweight" in entries

    def shape(self, layer: Layer) -> tuple[int, int]:
        channels, words = layer.matrix("qweight", torch.int32)
        groups = layer.groups(channels, channels if self.group_size == -1 else self.group_size)
        layer.check("scales", FLOATS, (groups, 8 * words))
        layer.check("qzeros", (torch.int32,), (groups, words))
        return 8 * words, channels

    def numbers(self, layer: Layer) -> Numbers:
        return "int4"

    def read(self, layer: Layer) -> QuantizedLinear:
        values, scales = _unpack(layer.load("qweight")), layer.load("scales").T
        return QuantizedLinear(
            values, scales, _unpack(layer.load("qzeros")), group_size=values.shape[1] // scales.shape[1]
        )


def _unpack(words: Tensor) -> Tensor:
    """``[n, out / 8]`` int32 to ``[out, n]`` uint8."""
    return unpack(words, 4).unflatten(1, (-1, 8))[..., _NIBBLES].flatten(1).T
