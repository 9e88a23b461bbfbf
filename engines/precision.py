"""What a pair of engines computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP16_REFUSED = (
    "precision 'fp16' is for no backend: the SwiGLU of this vision tower overflows it; bf16 is as small and as fast."
    " fp16-decoder builds the decoder in FP16 beside a BF16 tower, where torch or TensorRT runs it"
)
"""What it looks like: a cosine of 0.14 against FP32, https://github.com/NVIDIA/TensorRT-LLM/issues/3223."""


@dataclass(frozen=True)
class Precision:
    """One choice of ``--precision``.

    Attributes:
        name: as the option and the manifest spell it.
        vision: type of the vision tower, and of the pixels that it takes.
        decoder: type of the decoder, of the embeddings that it takes and of its cache.
        fp8: whether linear layers are quantised: they compute on FP8 numbers, everything between them in these types.
        fp8_vision: whether those of the vision tower are too.
    """

    name: str
    vision: torch.dtype
    decoder: torch.dtype
    fp8: bool = False
    fp8_vision: bool = True


FP32 = Precision("fp32", torch.float32, torch.float32)
BF16 = Precision("bf16", torch.bfloat16, torch.bfloat16)
FP16_DECODER = Precision("fp16-decoder", torch.bfloat16, torch.float16)
FP8 = Precision("fp8", torch.bfloat16, torch.bfloat16, fp8=True)
FP8_DECODER = Precision("fp8", torch.bfloat16, torch.bfloat16, fp8=True, fp8_vision=False)
"""What TensorRT-LLM loads: its vision tower takes no quantised weight."""
FP8_IN_FP32 = Precision("fp8", torch.float32, torch.float32, fp8=True)
"""FP8 where there is no BF16 to compute in: ONNX Runtime on a CPU."""
