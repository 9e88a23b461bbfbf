"""What the vision tower and the decoder share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """``down(silu(gate(x)) * up(x))``. Its product overflows FP16 in the vision tower; BF16 or FP32 only there."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Rotary frequencies ``theta ** (-2i / dim)`` for i in 0 .. dim / 2: ``[dim / 2]`` FP32.

    Always real and on the CPU, also while a module is built on the meta device: no checkpoint brings them.
    """
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
