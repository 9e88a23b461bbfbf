"""Weights that are rounded here, as compressed-tensors stores them, see :mod:`.compressed_tensors`.

The forms are those that vLLM loads with weights alone quantised: ``pack-quantized`` for integers, of 8 bits too
(``CompressedTensorsWNA16``), and ``nvfp4-pack-quantized`` (``CompressedTensorsW4A4Fp4(use_a16=True)``), in ``vllm/
model_executor/layers/quantization/compressed_tensors`` of its release 0.32.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import NVFP4_BLOCK, Numbers, pack
from .rounding import nvfp4_global_scale, round_to_nearest, round_to_nvfp4

_GROUP_SIZES = (128, 64, 32)
"""That vLLM's kernels take, the first choice first."""


@dataclass(frozen=True)
class WeightFormat:
    """How the linear layers of a checkpoint are stored.

    Attributes:
        numbers: that weights are rounded to.
        group_size: input channels of a scale; None where all have one.
    """

    numbers: Numbers
    group_size: int | None

    @classmethod
    def of(cls, numbers: Numbers, channels: Collection[int]) -> WeightFormat:
        """For layers with these numbers of input channels: the first group size that divides them all."""
        sizes = (NVFP4_BLOCK,) if numbers == "nvfp4" else _GROUP_SIZES
        return cls(numbers, next((size for size in sizes if not any(width % size for width in channels)), None))

    def settings(self, ignore: list[str]) -> dict[str, Any]:
        """``quantization_config``.

        Args:
            ignore: names of linear layers that are not quantised, or patterns of them.
        """
        if self.numbers == "nvfp4":
            stored, kind, strategy = "nvfp4-pack-quantized", "float", "tensor_group"
        else:
            stored, kind, strategy = "pack-quantized", "int", "group" if self.group_size else "channel"
        weights = {
            "num_bits": 8 if self.numbers == "int8" else 4,
            "type": kind,
            "symmetric": True,
            "strategy": strategy,
            "group_size": self.group_size,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": stored,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": stored}},
            "ignore": ignore,
        }

    def tensors(self, weight: Tensor, scale_dtype: torch.dtype, largest: Tensor) -> dict[str, Tensor]:
        """The tensors of a layer, by what follows its name; of a weight on the meta device, their types and shapes.

        Args:
            weight: ``[out, in]`` of floating point.
            scale_dtype: of integers' scales.
            largest: the largest magnitude of the layer's weights and of those that vLLM joins with it, ``[]``.
        """
        if self.numbers == "nvfp4":
            overall = nvfp4_global_scale(largest)
            codes, scales = round_to_nvfp4(weight, overall)
            parts = {"weight_packed": pack(codes, 4), "weight_scale": scales}
            return parts | {"weight_global_scale": overall.reshape(1)}
        bits = 8 if self.numbers == "int8" else 4
        rounded = round_to_nearest(weight, bits, self.group_size or weight.shape[1], scale_dtype)
        unsigned = (rounded.values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        words = pack(F.pad(unsigned, (0, -unsigned.shape[1] % (32 // bits))), bits).view(torch.int32)
        shape = torch.tensor(weight.shape)
        return {"weight_packed": words, "weight_scale": rounded.scales.to(scale_dtype), "weight_shape": shape}
