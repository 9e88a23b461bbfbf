"""The modules for a GPU: merged projections (qkv, gate_up), one fused op between two of them (docs/design/torch.md).

Made from loaded modules; never exported. FP8 layers are merged only where their scales are equal, as Model Optimizer
makes them for layers of one input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Decoder, DecoderAttention, DecoderLayer, DecoderStack, LayerCache
from .fused_ops import FusedOps
from .layers import FP8Linear, SwiGLU
from .ops import FP8_ALIGNMENT, fits_scaled_mm, rotate, scaled_mm
from .varlen import packed_attention
from .vision import Sequences, VisionAttention, VisionBlock, VisionTransformer
from .windows import PackedSequences


class Norm(NamedTuple):
    """A norm, and the FP8 input scale of the layer after it; None if that layer takes no FP8."""

    norm: nn.RMSNorm
    scale: Tensor | None


class FusedDecoderStack(DecoderStack):
    """:class:`~qwen2vl_trt.decoder.DecoderStack` with each residual added in the kernel of the next norm."""

    def __init__(self, stack: DecoderStack, fused_ops: FusedOps) -> None:
        nn.Module.__init__(self)
        self.config, self.layers, self.norm = stack.config, stack.layers, stack.norm
        self.rotary_scale = stack.rotary_scale
        self.register_buffer("inv_freq", stack.inv_freq, persistent=False)
        self._ops = fused_ops
        self._layers = [layer for layer in stack.layers if isinstance(layer, DecoderLayer)]
        self._norms = [
            norm
            for layer in self._layers
            for norm in (
                Norm(layer.input_layernorm, _input_scale(layer.self_attn)),
                Norm(layer.post_attention_layernorm, _input_scale(layer.mlp)),
            )
        ] + [Norm(stack.norm, None)]

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, caches: Sequence[LayerCache] | None = None
    ) -> tuple[Tensor, list[LayerCache]]:
        cos, sin = self._ops.rotary_cos_sin(position_ids, self.inv_freq, self.config.mrope_section, self.rotary_scale)
        x, updated = inputs_embeds, []
        y = self._ops.rms_norm(x, *self._norms[0])
        for index, layer in enumerate(self._layers):
            y, cache = layer.self_attn(y, cos, sin, caches[index] if caches is not None else None)
            updated.append(cache)
            x, y = self._ops.add_rms_norm(x, y, *self._norms[2 * index + 1])
            x, y = self._ops.add_rms_norm(x, layer.mlp(y), *self._norms[2 * index + 2])
        return y, updated


class FusedVisionTransformer(VisionTransformer):
    """:class:`~qwen2vl_trt.vision.VisionTransformer` with each residual added in the kernel of the next norm."""

    def __init__(self, tower: VisionTransformer, fused_ops: FusedOps) -> None:
        nn.Module.__init__(self)
        self.config, self.patch_embed, self.blocks = tower.config, tower.patch_embed, tower.blocks
        self.merger = tower.merger
        self.register_buffer("inv_freq", tower.inv_freq, persistent=False)
        self._ops = fused_ops
        self._blocks = [block for block in tower.blocks if isinstance(block, VisionBlock)]
        self._norms = [
            norm
            for block in self._blocks
            for norm in (Norm(block.norm1, _input_scale(block.attn)), Norm(block.norm2, _input_scale(block.mlp)))
        ] + [Norm(tower.merger.ln_q, None)]

    def encode(
        self, pixel_values: Tensor, position_ids: Tensor, windows: Sequences, frames: Sequences, merge_index: Tensor
    ) -> Tensor:
        cos, sin = self.angles(position_ids)
        x = self.patch_embed(pixel_values)
        y = self._ops.rms_norm(x, *self._norms[0])
        for index, block in enumerate(self._blocks):
            y = block.attn(y, cos, sin, frames if index in self.config.fullatt_block_indexes else windows)
            x, y = self._ops.add_rms_norm(x, y, *self._norms[2 * index + 1])
            x, y = self._ops.add_rms_norm(x, block.mlp(y), *self._norms[2 * index + 2])
        return self.merger.mlp(y.reshape(-1, self.merger.width))[merge_index]


class FusedAttention(DecoderAttention):
    """:class:`~qwen2vl_trt.decoder.DecoderAttention` with one projection for q, k and v."""

    def __init__(self, attention: DecoderAttention, qkv_proj: nn.Module, fused_ops: FusedOps) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.kv_heads = attention.head_dim, _outputs(attention.k_proj) // attention.head_dim
        self.qkv_proj, self.o_proj, self._ops = qkv_proj, attention.o_proj, fused_ops

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        if cache is None or cache.slot_mapping is None:
            return super().forward(x, cos, sin, cache)
        q = self._ops.reshape_and_cache(self.qkv_proj(x), cos, sin, cache.k, cache.v, cache.slot_mapping)
        y = cache.attend(q)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1)), cache

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H + 2 Hkv, S, D]
        count = qkv.shape[1]
        rotated = rotate(qkv[:, : count - self.kv_heads], cos, sin)
        return rotated[:, : -self.kv_heads], rotated[:, -self.kv_heads :], qkv[:, count - self.kv_heads :]


class FusedVisionAttention(VisionAttention):
    """:class:`~qwen2vl_trt.vision.VisionAttention` with one kernel for the rotary embedding of packed q and k."""

    def __init__(self, attention: VisionAttention, fused_ops: FusedOps) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.qkv, self.proj, self._ops = attention.qkv, attention.proj, fused_ops

    def _packed(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: PackedSequences) -> Tensor:
        qkv = self.qkv(x)  # [1, P, 3 C]
        q, k = self._ops.rotary_embedding(qkv, cos, sin, 2 * self.heads).chunk(2, dim=1)  # each [P, H, D]
        v = qkv[0].view(-1, 3 * self.heads, self.head_dim)[:, 2 * self.heads :]
        y = packed_attention(q, k, v, sequences.cu_seqlens, sequences.max_seqlen)
        return self.proj(y.reshape(x.shape))


class FusedSwiGLU(nn.Module):
    """:class:`~qwen2vl_trt.layers.SwiGLU` with one projection for gate and up."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, fused_ops: FusedOps) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self._ops = gate_up_proj, down_proj, fused_ops

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._ops.silu_and_mul(self.gate_up_proj(x), _scale(self.down_proj)))


class ScaledMMLinear(nn.Module):
    """:class:`~qwen2vl_trt.layers.FP8Linear` through ``torch._scaled_mm``; its input may be FP8 already."""

    def __init__(self, layer: FP8Linear, dtype: torch.dtype, fused_ops: FusedOps) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_scale, self.input_scale = layer.weight_scale, layer.input_scale
        self._dtype, self._ops = dtype, fused_ops

    def forward(self, x: Tensor) -> Tensor:
        values = x if x.dtype == self.weight.dtype else self._ops.quantize_fp8(x, self.input_scale)
        return scaled_mm(values, self.weight, self.weight_scale, self.input_scale, self.bias, self._dtype)


def fuse_decoder(decoder: Decoder, dtype: torch.dtype) -> FusedOps:
    """Fuse a loaded decoder in place.

    Args:
        decoder: without its embedding table.
        dtype: of activations.

    Returns:
        What its modules share, to be compiled.
    """
    fused_ops = FusedOps()
    fuse_attention(decoder, fused_ops)
    fuse_mlp(decoder, fused_ops)
    _multiply_fp8(decoder, dtype, fused_ops)
    decoder.model = FusedDecoderStack(decoder.model, fused_ops)
    return fused_ops


def fuse_vision(tower: VisionTransformer, dtype: torch.dtype) -> tuple[FusedVisionTransformer, FusedOps]:
    """The fused form of a loaded tower, whose modules it takes and changes. See :func:`fuse_decoder`."""
    fused_ops = FusedOps()
    fuse_mlp(tower, fused_ops)
    _multiply_fp8(tower, dtype, fused_ops)
    for block in tower.blocks:
        if isinstance(block, VisionBlock):
            block.attn = FusedVisionAttention(block.attn, fused_ops)
    return FusedVisionTransformer(tower, fused_ops), fused_ops


@torch.no_grad()
def fuse_attention(module: nn.Module, fused_ops: FusedOps) -> None:
    """Merge q, k and v of every decoder layer inside a module."""

    def fused(attention: DecoderAttention) -> nn.Module | None:
        joined = join([attention.q_proj, attention.k_proj, attention.v_proj])
        return joined and FusedAttention(attention, joined, fused_ops)

    _replace(module, DecoderAttention, fused)


@torch.no_grad()
def fuse_mlp(module: nn.Module, fused_ops: FusedOps) -> None:
    """Merge gate and up of every SwiGLU inside a module.

    The intermediate size is padded with zeros to a multiple of 16, as ``torch._scaled_mm`` and fast BF16 kernels need:
    the published vision towers have 3,420.
    """

    def fused(mlp: SwiGLU) -> nn.Module | None:
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if not all(isinstance(layer, (nn.Linear, FP8Linear)) for layer in (gate, up, down)):
            return None
        missing = -_outputs(gate) % FP8_ALIGNMENT
        _pad(gate, rows=missing)
        _pad(up, rows=missing)
        _pad(down, columns=missing)
        joined = join([gate, up])
        return joined and FusedSwiGLU(joined, down, fused_ops)

    _replace(module, SwiGLU, fused)


def _replace(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module | None]) -> None:
    """Replace, one at a time, the modules of a type inside a module; those for which ``make`` gives None stay."""
    for name, child in list(module.named_children()):
        if not isinstance(child, kind):
            _replace(child, kind, make)
        elif (made := make(child)) is not None:
            setattr(module, name, made)


def join(layers: Sequence[nn.Module]) -> nn.Module | None:
    """Merge linear layers of one input into one, outputs side by side; None if types, biases or FP8 scales differ."""
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


def _multiply_fp8(module: nn.Module, dtype: torch.dtype, fused_ops: FusedOps) -> None:
    def multiplied(layer: FP8Linear) -> nn.Module | None:
        fits = fits_scaled_mm(layer.weight, dtype, layer.weight.device)
        return ScaledMMLinear(layer, dtype, fused_ops) if fits else None

    _replace(module, FP8Linear, multiplied)


def _input_scale(module: nn.Module) -> Tensor | None:
    """The FP8 input scale of a module; None if it takes no FP8, as unmerged layers, whose scales differ."""
    names = ("qkv_proj", "qkv", "gate_up_proj")
    return next((_scale(getattr(module, name)) for name in names if hasattr(module, name)), None)


def _scale(layer: nn.Module) -> Tensor | None:
    return layer.input_scale if isinstance(layer, ScaledMMLinear) else None


def _pad(layer: nn.Linear | FP8Linear, rows: int = 0, columns: int = 0) -> None:
    if rows or columns:
        weight = layer.weight.detach()
        # torch pads bytes everywhere, FP8 numbers not on every device; all bits zero is the number zero
        padded = F.pad(weight.view(torch.uint8) if weight.itemsize == 1 else weight, (0, columns, 0, rows))
        layer.weight = _parameter(padded.view(weight.dtype))
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
