"""Our preprocessor and Transformers' image processors, both at the published checkpoints' settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.export.importable_torchvision import allow_torchvision
from qwen2vl_trt.runtime.preprocessing.preprocessor import Kernels, Preprocessor

Process = Callable[[list[Any]], Any]
Size = tuple[int, int]
"""(height, width) in pixels."""

_VISION = VisionConfig(32, 1280, 16, 3420, 3584, (7, 15, 23, 31))


def batches(count: int) -> dict[str, list[Size]]:
    """Sizes of ``count`` images by title: all alike, and mixed."""
    sides = random.Random(0)
    mixed = [(sides.randint(200, 1500), sides.randint(200, 1500)) for _ in range(count)]
    return {
        f"{count} images of 448x448": [(448, 448)] * count,
        f"{count} images of mixed sizes, 200 to 1500 px": mixed,
    }


def ours(device: str = "cpu", dtype: torch.dtype = torch.float32, kernels: Kernels = "auto") -> Process:
    """Images to patches, written over its last result as the pipeline has it do."""
    preprocessor = Preprocessor(_VISION, device=device, dtype=dtype, kernels=kernels)
    memory: list[Tensor] = [torch.empty(0, dtype=dtype, device=device)]

    def process(images: list[Any]) -> Tensor:
        packed = preprocessor.preprocess(images, out=memory[0])
        memory[0] = max(memory[0], packed.pixel_values.view(-1), key=Tensor.numel)
        return packed.pixel_values

    return process


def transformers(backend: str = "torchvision", device: str = "cpu") -> Process:
    """FP32; ``backend`` is torchvision, its default, or pillow, for the CPU alone."""
    allow_torchvision()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    if backend == "pillow":
        pillow: Any = Qwen2VLImageProcessorPil()
        return lambda images: pillow(images=images, return_tensors="pt")
    processor: Any = Qwen2VLImageProcessor()
    return lambda images: processor(images=images, device=device, return_tensors="pt")
