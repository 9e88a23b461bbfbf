"""The modules of a GPU: few matrix products, and one step of :mod:`qwen2vl_trt.pointwise` between two of them.

Layers that share their input become one product (q, k and v; gate and up), a residual is added where the next norm
reads it, and FP8 is made where its number arises. For loaded modules; never exported.

FP8 layers join where their scales are equal, as Model Optimizer makes them for layers of one input. Different scales of
the input would be different numbers going in, so such layers stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Decoder, DecoderAttention, DecoderLayer, DecoderStack, LayerCache
from .layers import FP8Linear, SwiGLU
from .ops import FP8_ALIGNMENT, fp8_product, multiplies_fp8, rotate
from .pointwise import Pointwise
from .varlen import packed_attention
from .vision import Sequences, VisionAttention, VisionBlock, VisionTransformer
from .windows import PackedSequences


class Norm(NamedTuple):
    """A norm, and the scale of the FP8 numbers that what comes after it takes, if it does."""

    norm: nn.RMSNorm
    scale: Tensor | None


class FusedDecoderStack(DecoderStack):
    """:class:`~qwen2vl_trt.decoder.DecoderStack` whose layers hand on the residual apart from what comes to it."""

    def __init__(self, stack: DecoderStack, pointwise: Pointwise) -> None:
        nn.Module.__init__(self)
        self.config, self.layers, self.norm = stack.config, stack.layers, stack.norm
        self.rotary_scale = stack.rotary_scale
        self.register_buffer("inv_freq", stack.inv_freq, persistent=False)
        self._pointwise = pointwise
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
        cos, sin = self._pointwise.angles(position_ids, self.inv_freq, self.config.mrope_section, self.rotary_scale)
        x, updated = inputs_embeds, []
        y = self._pointwise.norm(x, *self._norms[0])
        for index, layer in enumerate(self._layers):
            y, cache = layer.self_attn(y, cos, sin, caches[index] if caches is not None else None)
            updated.append(cache)
            x, y = self._pointwise.add_norm(x, y, *self._norms[2 * index + 1])
            x, y = self._pointwise.add_norm(x, layer.mlp(y), *self._norms[2 * index + 2])
        return y, updated


class FusedVisionTransformer(VisionTransformer):
    """:class:`~qwen2vl_trt.vision.VisionTransformer`, likewise."""

    def __init__(self, tower: VisionTransformer, pointwise: Pointwise) -> None:
        nn.Module.__init__(self)
        self.config, self.patch_embed, self.blocks = tower.config, tower.patch_embed, tower.blocks
        self.merger = tower.merger
        self.register_buffer("inv_freq", tower.inv_freq, persistent=False)
        self._pointwise = pointwise
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
        y = self._pointwise.norm(x, *self._norms[0])
        for index, block in enumerate(self._blocks):
            y = block.attn(y, cos, sin, frames if index in self.config.fullatt_block_indexes else windows)
            x, y = self._pointwise.add_norm(x, y, *self._norms[2 * index + 1])
            x, y = self._pointwise.add_norm(x, block.mlp(y), *self._norms[2 * index + 2])
        return self.merger.mlp(y.reshape(-1, self.merger.width))[merge_index]


class FusedAttention(DecoderAttention):
    """:class:`~qwen2vl_trt.decoder.DecoderAttention` with one projection, which goes to a cache in one step."""

    def __init__(self, attention: DecoderAttention, qkv_proj: nn.Module, pointwise: Pointwise) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.kv_heads = attention.head_dim, _outputs(attention.k_proj) // attention.head_dim
        self.qkv_proj, self.o_proj, self._pointwise = qkv_proj, attention.o_proj, pointwise

    @property
    def input_layer(self) -> nn.Module:
        return self.qkv_proj

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        if cache is None or cache.places is None:
            return super().forward(x, cos, sin, cache)
        q = self._pointwise.store(self.qkv_proj(x), cos, sin, cache.k, cache.v, *cache.places)
        y = cache.attend(q)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1)), cache

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H + 2 Hkv, S, D]
        count = qkv.shape[1]
        rotated = rotate(qkv[:, : count - self.kv_heads], cos, sin)
        return rotated[:, : -self.kv_heads], rotated[:, -self.kv_heads :], qkv[:, count - self.kv_heads :]


class FusedVisionAttention(VisionAttention):
    """:class:`~qwen2vl_trt.vision.VisionAttention` whose queries and keys rotate in one step, where they are packed."""

    def __init__(self, attention: VisionAttention, pointwise: Pointwise) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.qkv, self.proj, self._pointwise = attention.qkv, attention.proj, pointwise

    @property
    def input_layer(self) -> nn.Module:
        return self.qkv

    def _packed(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: PackedSequences) -> Tensor:
        qkv = self.qkv(x)  # [1, P, 3 C]
        q, k = self._pointwise.rotate(qkv, cos, sin, 2 * self.heads).chunk(2, dim=1)  # each [P, H, D]
        v = qkv[0].view(-1, 3 * self.heads, self.head_dim)[:, 2 * self.heads :]
        y = packed_attention(q, k, v, sequences.bounds, sequences.longest)
        return self.proj(y.reshape(x.shape))


class FusedSwiGLU(nn.Module):
    """:class:`~qwen2vl_trt.layers.SwiGLU` with one projection for gate and up."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, pointwise: Pointwise) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self._pointwise = gate_up_proj, down_proj, pointwise

    @property
    def input_layer(self) -> nn.Module:
        return self.gate_up_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._pointwise.gate(self.gate_up_proj(x), _scale(self.down_proj)))


class FP8Product(nn.Module):
    """:class:`~qwen2vl_trt.layers.FP8Linear` as a product of FP8 numbers; its input may be such already."""

    def __init__(self, layer: FP8Linear, dtype: torch.dtype, pointwise: Pointwise) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_scale, self.input_scale = layer.weight_scale, layer.input_scale
        self._dtype, self._pointwise = dtype, pointwise

    def forward(self, x: Tensor) -> Tensor:
        values = x if x.dtype == self.weight.dtype else self._pointwise.quantize(x, self.input_scale)
        return fp8_product(values, self.weight, self.weight_scale, self.input_scale, self.bias, self._dtype)


def fuse_decoder(decoder: Decoder, dtype: torch.dtype) -> Pointwise:
    """Fuse a loaded decoder in place.

    Args:
        decoder: without its embedding table, which stays apart.
        dtype: of activations.

    Returns:
        What its modules share, for :meth:`~qwen2vl_trt.pointwise.Pointwise.compile`.
    """
    pointwise = Pointwise()
    fuse_attention(decoder, pointwise)
    fuse_mlp(decoder, pointwise)
    _multiply_fp8(decoder, dtype, pointwise)
    decoder.model = FusedDecoderStack(decoder.model, pointwise)
    return pointwise


def fuse_vision(tower: VisionTransformer, dtype: torch.dtype) -> tuple[FusedVisionTransformer, Pointwise]:
    """A loaded tower fused, over the same weights; its modules change. See :func:`fuse_decoder`."""
    pointwise = Pointwise()
    fuse_mlp(tower, pointwise)
    _multiply_fp8(tower, dtype, pointwise)
    for block in tower.blocks:
        if isinstance(block, VisionBlock):
            block.attn = FusedVisionAttention(block.attn, pointwise)
    return FusedVisionTransformer(tower, pointwise), pointwise


@torch.no_grad()
def fuse_attention(module: nn.Module, pointwise: Pointwise) -> None:
    """Join q, k and v of every decoder layer inside a module, one at a time."""
    for name, child in list(module.named_children()):
        if isinstance(child, DecoderAttention):
            joined = join([child.q_proj, child.k_proj, child.v_proj])
            if joined is not None:
                setattr(module, name, FusedAttention(child, joined, pointwise))
        else:
            fuse_attention(child, pointwise)


@torch.no_grad()
def fuse_mlp(module: nn.Module, pointwise: Pointwise) -> None:
    """Join gate and up of every SwiGLU inside a module, one at a time.

    They get intermediate channels of zeros up to a multiple of 16, which the 3,420 of the published vision towers is
    not: silu(0) * 0 adds nothing. FP8 products take no other, and fast BF16 ones want rows of whole 16 bytes.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, SwiGLU):
            gate, up, down = child.gate_proj, child.up_proj, child.down_proj
            missing = -_outputs(gate) % FP8_ALIGNMENT
            _pad(gate, rows=missing)
            _pad(up, rows=missing)
            _pad(down, columns=missing)
            joined = join([gate, up])
            if joined is not None:
                setattr(module, name, FusedSwiGLU(joined, down, pointwise))
        else:
            fuse_mlp(child, pointwise)


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


def _multiply_fp8(module: nn.Module, dtype: torch.dtype, pointwise: Pointwise) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, FP8Linear):
            if multiplies_fp8(child.weight, dtype, child.weight.device):
                setattr(module, name, FP8Product(child, dtype, pointwise))
        else:
            _multiply_fp8(child, dtype, pointwise)


def _input_scale(module: nn.Module) -> Tensor | None:
    """Scale of the FP8 numbers that a module takes; None if it takes others."""
    layer = getattr(module, "input_layer", None)  # which only fused modules have: the others' layers differ in scale
    return None if layer is None else _scale(layer)


def _scale(layer: nn.Module) -> Tensor | None:
    return layer.input_scale if isinstance(layer, FP8Product) else None


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
