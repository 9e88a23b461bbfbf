"""What a pair of engines computes in, and what the torch backend takes on a CPU unless told."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from qwen2vl_trt.quantized.linear import Numbers

logger = logging.getLogger(__name__)

FP16_REFUSED = (
    "precision 'fp16' is for no backend: the SwiGLU of this vision tower overflows it; bf16 is as small and as fast."
    " fp16-decoder builds the decoder in FP16 beside a BF16 tower, where torch or TensorRT runs it"
)
"""What it looks like: a cosine of 0.14 against FP32, https://github.com/NVIDIA/TensorRT-LLM/issues/3223."""

QUANT_METHODS = ("awq", "rtn")
"""How weights become INT4: scaled by Model Optimizer's search over calibration data first, or rounded to nearest."""


@dataclass(frozen=True)
class Precision:
    """One choice of ``--precision``.

    Attributes:
        name: as the option and the manifest spell it.
        vision_type: PyTorch's name for the type of the vision tower, and of the pixels that it takes.
        decoder_type: likewise of the decoder, of the embeddings that it takes and of its cache.
        weights: what linear layers hold their weights in, where that is another type: FP8 layers compute in it too;
            those of 4 and 8 bits are the decoder's alone, and everything between them is in these types. Backends that
            compute on a CPU then hold ``lm_head`` in 8 bits, too, rounded to nearest: checkpoints leave it in 16, and
            it would be most of what a step reads.
        fp8_vision: FP8 layers are those of the vision tower too.
    """

    name: str
    vision_type: str
    decoder_type: str
    weights: Literal["fp8", "int4", "int8", "nvfp4"] | None = None
    fp8_vision: bool = True

    @property
    def fp8(self) -> bool:
        """Whether layers compute on FP8 numbers."""
        return self.weights == "fp8"

    @property
    def weight_only(self) -> Numbers | None:
        """The numbers of the decoder's weights where those alone are quantised."""
        return None if self.weights == "fp8" else self.weights

    @property
    def vision(self) -> torch.dtype:
        """``vision_type`` as a torch type; PyTorch is imported here, so that the options' help does without."""
        import torch

        return getattr(torch, self.vision_type)

    @property
    def decoder(self) -> torch.dtype:
        """``decoder_type`` likewise."""
        import torch

        return getattr(torch, self.decoder_type)


FP32 = Precision("fp32", "float32", "float32")
BF16 = Precision("bf16", "bfloat16", "bfloat16")
FP16_DECODER = Precision("fp16-decoder", "bfloat16", "float16")
FP8 = Precision("fp8", "bfloat16", "bfloat16", "fp8")
FP8_DECODER = Precision("fp8", "bfloat16", "bfloat16", "fp8", fp8_vision=False)
"""What TensorRT-LLM loads: its vision tower takes no quantised weight."""
FP8_IN_FP32 = Precision("fp8", "float32", "float32", "fp8")
"""For ONNX Runtime, which has no BF16 to compute in on a CPU."""
INT4 = Precision("int4", "bfloat16", "bfloat16", "int4")
INT4_IN_FP32 = Precision("int4", "float32", "float32", "int4")
INT8 = Precision("int8", "bfloat16", "bfloat16", "int8")
INT8_IN_FP32 = Precision("int8", "float32", "float32", "int8")
NVFP4 = Precision("nvfp4", "bfloat16", "bfloat16", "nvfp4")
NVFP4_IN_FP32 = Precision("nvfp4", "float32", "float32", "nvfp4")

SINCE = {"fp8": (8, 9), "nvfp4": (10, 0)}
"""Compute capabilities from which on GPUs have products of such numbers."""

_ROWS, _WIDTH = 64, 512
_REPETITIONS = 3
_EMULATED = 4.0
"""Between the 6 to 9 times that AVX2 takes and the 2 that AVX-512 without BF16 instructions should take at most (two
products of FP32 for each): a busy moment must not change the precision, and with it the name of an engine folder."""


def cpu_precision() -> Precision:
    """FP32 where this CPU emulates BF16, as those without AVX-512 do, else BF16, which halves memory and traffic."""
    slowdown = bf16_slowdown()
    chosen = FP32 if slowdown >= _EMULATED else BF16
    logger.log(
        logging.INFO if chosen is BF16 else logging.WARNING,
        "precision %s: a product in bf16 takes %.1f times as long as in fp32 on this CPU; --precision chooses",
        chosen.name,
        slowdown,
    )
    return chosen


def computed_on_cpu(precision: Precision) -> Precision:
    """As :func:`cpu_precision` for weights of 4 and 8 bits: what is between their products."""
    if precision.weight_only is None or bf16_slowdown() < _EMULATED:
        return precision
    return replace(precision, vision_type="float32", decoder_type="float32")


@cache
def bf16_slowdown() -> float:
    """How many times as long a matrix product in BF16 takes as one in FP32; some milliseconds, once a process."""
    import torch
    import torch.nn.functional as F

    operands = {
        dtype: (torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another where other processes run, longer than they compute
    try:
        for repetition in range(1 + _REPETITIONS):
            for dtype, (x, weight) in operands.items():
                began = time.perf_counter()
                F.linear(x, weight)
                if repetition:  # the first prepares its kernel
                    seconds[dtype].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[torch.bfloat16]) / min(seconds[torch.float32])
