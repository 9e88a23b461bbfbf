"""Layers that the vision tower and the decoder share."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import dequantize_blocks, dequantize_fp8, fp8_linear, round_to_fp8


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


class BlockedLinear(nn.Module):
    """A linear layer over a weight of 4 or 8 bits as graphs have it: :class:`~.quantized.blocks.BlockedWeight`, turned.

    ``weight [in, out]`` and ``scales [in / block_size, out]`` are dequantised before a matrix product, a pattern that
    engines fuse. The other parts are there where the weight has them: ``offsets [in / block_size, out]``,
    ``permutation [in]``, ``input_scale [in]``. Where a graph has numbers in E2M1, it has no ``scales`` but
    ``block_scales [in / block_size, out]`` in E4M3 and a ``global_scale`` in FP32, which multiplies them.

    Args:
        linear: whose place it takes; may be on the meta device.
        block_size: 0: all channels are one block, and ``scales`` are ``[out]``.
        parts: which of these parameters there are, ``weight`` among them. Their values are put into the graph.
    """

    SCALES = ("scales", "offsets", "input_scale")
    """The parts in the type of the activations, beside the bias."""

    weight: Tensor
    scales: Tensor | None
    block_scales: Tensor
    global_scale: Tensor
    offsets: Tensor | None
    permutation: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, block_size: int, parts: Collection[str]) -> None:
        super().__init__()
        self.block_size = block_size
        out, channels = linear.weight.shape
        blocks = (channels // (block_size or channels), out)
        for part, shape, dtype in (
            ("weight", (channels, out), torch.int8),
            ("scales", blocks if block_size else (out,), linear.weight.dtype),
            ("block_scales", blocks, torch.float8_e4m3fn),
            ("global_scale", (), torch.float32),
            ("offsets", blocks, linear.weight.dtype),
            ("permutation", (channels,), torch.int64),
            ("input_scale", (channels,), linear.weight.dtype),
        ):
            values = torch.zeros(shape, dtype=dtype, device=linear.weight.device) if part in parts else None
            self.register_parameter(part, None if values is None else nn.Parameter(values, requires_grad=False))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        if self.input_scale is not None:
            x = x * self.input_scale
        scales = self.scales if self.scales is not None else dequantize_fp8(self.block_scales, self.global_scale, x)
        y = x @ dequantize_blocks(self.weight, scales, self.block_size)
        if self.offsets is not None:
            blocks = len(self.offsets)
            y = y + x.view(*x.shape[:-1], blocks, x.shape[-1] // blocks).sum(-1) @ self.offsets
        return y if self.bias is None else y + self.bias


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Rotary frequencies ``theta ** (-2i / dim)`` for i in 0 .. dim / 2: ``[dim / 2]`` FP32.

    On the CPU also while a module is built on the meta device, since no checkpoint has them.
    """
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
