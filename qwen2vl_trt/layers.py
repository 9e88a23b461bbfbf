"""Layers that the vision tower and the decoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import dequantize_fp8, fp8_linear, round_to_fp8


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with its arithmetic in FP32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return super().forward(x)
        # The same in fewer passes: on a CPU, torch's own takes several times as long in BF16.
        y = x.float()
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        y = y * scale if y is x else y.mul_(scale)
        return y.mul_(self.weight).type_as(x)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``. Overflows FP16 in the vision tower, where only BF16 and FP32 serve."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FP8Linear(nn.Module):
    """A linear layer over FP8 (E4M3), with a scale per tensor for its weight and a static one for its input.

    ``y = (q(x / input_scale) @ weight.T) * input_scale * weight_scale + bias``, where ``q`` rounds to E4M3 and
    saturates. Parameters have NVIDIA Model Optimizer's names.
    """

    SCALES = ("weight_scale", "input_scale")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        device = linear.weight.device
        weight = torch.empty(linear.weight.shape, dtype=torch.float8_e4m3fn, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones((), device=device), requires_grad=False)
        self.input_scale = nn.Parameter(torch.ones((), device=device), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            # Both operands dequantised before a linear layer, a pattern that engines fuse.
            return F.linear(
                round_to_fp8(x, self.input_scale), dequantize_fp8(self.weight, self.weight_scale, x), self.bias
            )
        return fp8_linear(x, self.weight, self.weight_scale, self.input_scale, self.bias)


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Rotary frequencies ``theta ** (-2i / dim)`` for i in 0 .. dim / 2: ``[dim / 2]`` FP32.

    On the CPU also while a module is built on the meta device, since no checkpoint has them.
    """
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
