"""NVIDIA Model Optimizer's unified checkpoints of 4 bits. Source: ``modelopt/torch/export`` and ``quantization`` 0.47.

Its FP8 is no matter of storage alone, see :mod:`qwen2vl_trt.quantization`.

- NVFP4: ``weight [out, in / 2]`` holds two E2M1 a byte, the lower bits first; ``weight_scale [out, in / 16]`` in E4M3
  is multiplied by one FP32, ``weight_scale_2``.
- INT4-AWQ: ``weight [out / 2, in]`` holds the signed numbers of two rows a byte, the lower bits first;
  ``weight_scale [out, G]``.

``pre_quant_scale [in]`` multiplies the input of layers that have no norm to take it in. ``input_scale`` is for inputs
in NVFP4, which stay as they are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .linear import Numbers, QuantizedLinear, e2m1, unpack
from .stored import FLOATS, Entry, Layer, Settings

_NVFP4 = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ")
_INT4 = ("W4A16_AWQ",)


@dataclass(frozen=True)
class ModelOptimizer:
    """See :class:`qwen2vl_trt.quantized.stored.Format`.

    Attributes:
        algorithm: ``quant_algo``.
        group_size: of INT4-AWQ; None where only the scales say it.
    """

    method = "NVIDIA Model Optimizer"
    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")

    algorithm: str
    group_size: int | None

    @classmethod
    def of(cls, settings: Settings) -> ModelOptimizer:
        """Raises CheckpointError: a setting that is not read."""
        algorithm = settings.choice("quant_algo", ("FP8", *_NVFP4, *_INT4))
        settings.choice("has_zero_point", (False,), False)
        if algorithm in _NVFP4:
            settings.choice("group_size", (16,), 16)
            return cls(algorithm, 16)
        return cls(algorithm, settings.group_size() if "group_size" in settings.raw else None)

    def is_quantized(self, entries: Mapping[str, Entry]) -> bool:
        return "weight_scale" in entries or ("weight" in entries and entries["weight"].dtype == torch.uint8)

    def shape(self, layer: Layer) -> tuple[int, int]:
        rows, columns = layer.matrix("weight", torch.uint8)
        if self.algorithm in _NVFP4:
            out, channels = rows, 2 * columns
            layer.check("weight_scale", (torch.float8_e4m3fn,), (out, layer.groups(channels, 16)))
            layer.check("weight_scale_2", (torch.float32,), (), (1,))
        else:
            out, channels = 2 * rows, columns
            groups = layer.matrix("weight_scale", *FLOATS)[1] or 1
            size = self.group_size or channels // groups or 1
            layer.check("weight_scale", FLOATS, (out, layer.groups(channels, channels if size == -1 else size)))
        if "pre_quant_scale" in layer.entries:
            layer.check("pre_quant_scale", FLOATS, (channels,))
        return out, channels

    def numbers(self, layer: Layer) -> Numbers:
        return "nvfp4" if self.algorithm in _NVFP4 else "int4"

    def read(self, layer: Layer) -> QuantizedLinear:
        packed, scales, overall = layer.load("weight"), layer.load("weight_scale"), None
        if self.algorithm in _NVFP4:
            values = e2m1(unpack(packed, 4))
            overall = layer.load("weight_scale_2")
            scales = scales.float() * overall
        else:
            values = ((unpack(packed.T, 4) ^ 8).to(torch.int8) - 8).T
        smoothing = layer.load("pre_quant_scale") if "pre_quant_scale" in layer.entries else None
        size = values.shape[1] // scales.shape[1]
        return QuantizedLinear(values, scales, None, size, input_scale=smoothing, global_scale=overall)
