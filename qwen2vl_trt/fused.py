"""Layers that share their input as one matrix product: q, k and v; gate and up. For loaded modules; never exported.

FP8 layers join where their scales are equal, as Model Optimizer makes them for layers of one input. Different scales of
the input would be different numbers going in, so such layers stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import DecoderAttention
from .layers import FP8Linear, SwiGLU
from .ops import FP8_ALIGNMENT, rotate


class FusedAttention(DecoderAttention):
    """:class:`~qwen2vl_trt.decoder.DecoderAttention` with one projection; queries and keys rotate together."""

    def __init__(self, attention: DecoderAttention, qkv_proj: nn.Module) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.kv_heads = attention.head_dim, _outputs(attention.k_proj) // attention.head_dim
        self.qkv_proj, self.o_proj = qkv_proj, attention.o_proj

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H + 2 Hkv, S, D]
        count = qkv.shape[1]
        rotated = rotate(qkv[:, : count - self.kv_heads], cos, sin)
        return rotated[:, : -self.kv_heads], rotated[:, -self.kv_heads :], qkv[:, count - self.kv_heads :]


class FusedSwiGLU(nn.Module):
    """:class:`~qwen2vl_trt.layers.SwiGLU` with one projection for gate and up."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@torch.no_grad()
def fuse_attention(module: nn.Module) -> None:
    """Join q, k and v of every decoder layer inside a module, one at a time."""
    for name, child in list(module.named_children()):
        if isinstance(child, DecoderAttention):
            joined = join([child.q_proj, child.k_proj, child.v_proj])
            if joined is not None:
                setattr(module, name, FusedAttention(child, joined))
        else:
            fuse_attention(child)


@torch.no_grad()
def fuse_mlp(module: nn.Module) -> None:
    """Join gate and up of every SwiGLU inside a module, one at a time.

    FP8 ones get intermediate channels of zeros up to what FP8 products take, which the 3,420 of the published vision
    towers are not: silu(0) * 0 adds nothing.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, SwiGLU):
            gate, up, down = child.gate_proj, child.up_proj, child.down_proj
            if isinstance(gate, FP8Linear) and isinstance(up, FP8Linear) and isinstance(down, FP8Linear):
                missing = -_outputs(gate) % FP8_ALIGNMENT
                _pad(gate, rows=missing)
                _pad(up, rows=missing)
                _pad(down, columns=missing)
            joined = join([gate, up])
            if joined is not None:
                setattr(module, name, FusedSwiGLU(joined, down))
        else:
            fuse_mlp(child)


def join(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One linear layer that gives what several of one input give, side by side; None where it cannot be."""
    first = layers[0]
    if all(type(layer) is nn.Linear for layer in layers):
        joined: nn.Module = nn.Linear(1, 1, bias=False, device="meta")
    elif isinstance(first, FP8Linear) and all(isinstance(layer, FP8Linear) for layer in layers):
        if not all(
            torch.equal(getattr(layer, scale), getattr(first, scale)) for layer in layers for scale in FP8Linear.SCALES
        ):
            return None
        joined = FP8Linear(nn.Linear(1, 1, bias=False, device="meta"))
        for scale in FP8Linear.SCALES:
            setattr(joined, scale, getattr(first, scale))
    else:
        return None
    biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
    if len(biases) not in (0, len(layers)):
        return None
    joined.weight = _parameter(_cat([layer.weight for layer in layers if isinstance(layer.weight, Tensor)]))
    if biases:
        joined.bias = _parameter(torch.cat(biases))
    return joined


def _pad(layer: FP8Linear, rows: int = 0, columns: int = 0) -> None:
    if rows or columns:
        padded = F.pad(layer.weight.view(torch.uint8), (0, columns, 0, rows))  # all bits zero is the number zero
        layer.weight = _parameter(padded.view(layer.weight.dtype))
    if rows and layer.bias is not None:
        layer.bias = _parameter(F.pad(layer.bias, (0, rows)))


def _cat(weights: Sequence[Tensor]) -> Tensor:
    dtype = weights[0].dtype
    if dtype.itemsize == 1:  # torch joins bytes everywhere, FP8 numbers not on every device
        return torch.cat([weight.view(torch.uint8) for weight in weights]).view(dtype)
    return torch.cat(list(weights))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _outputs(layer: nn.Module) -> int:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.shape[0]
