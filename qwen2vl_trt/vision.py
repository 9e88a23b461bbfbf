"""The vision tower over windows of any mix of image sizes.

Most blocks attend within windows, one dense batch ``[W, S, C]``. Those of ``fullatt_block_indexes`` attend within an
image (or video frame): they gather q, k and v to ``[B, N]``, attend with a length per sequence, and gather back.
"""

from __future__ import annotations

from torch import Tensor, nn

from .config import VisionConfig
from .layers import RMSNorm, SwiGLU, inverse_frequencies
from .ops import ragged_attention, rotate
from .varlen import packed_attention
from .windows import PackedSequences, PaddedSequences

_NORM_EPS = 1e-6  # no field of vision_config: the published tower fixes it

Sequences = PaddedSequences | PackedSequences
"""Which patches attend to each other; packed where :mod:`qwen2vl_trt.varlen` runs."""


class VisionTransformer(nn.Module):
    """Qwen2.5-VL's vision tower. Parameter names are the checkpoint's, without the prefix ``visual.``."""

    inv_freq: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.register_buffer("inv_freq", inverse_frequencies(config.head_dim // 2, config.rope_theta), persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        window_lengths: Tensor,
        position_ids: Tensor,
        sequence_index: Tensor,
        sequence_lengths: Tensor,
        sequence_position: Tensor,
        merge_index: Tensor,
    ) -> Tensor:
        """Embed a batch of images and video frames.

        Args:
            pixel_values: ``[W, S, qwen2_vl_dim]`` patches in window order; the rest is a
                :class:`~qwen2vl_trt.windows.WindowLayout`.

        Returns:
            ``[T, out_hidden_size]`` image embeddings, each image's in raster order.
        """
        windows = PaddedSequences(window_lengths)
        frames = PaddedSequences(sequence_lengths, sequence_index, sequence_position)
        return self.encode(pixel_values, position_ids, windows, frames, merge_index)

    def encode(
        self, pixel_values: Tensor, position_ids: Tensor, windows: Sequences, frames: Sequences, merge_index: Tensor
    ) -> Tensor:
        """:meth:`forward` for padded or packed patches ``[W, S, qwen2_vl_dim]``."""
        cos, sin = self.angles(position_ids)
        x = self.patch_embed(pixel_values)  # [W, S, C]
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, frames if index in self.config.fullatt_block_indexes else windows)
        return self.merger(x)[merge_index]

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines ``[W, S, D / 2]`` FP32 of ``[W, S, 2]``: half follows the row, half the column."""
        angles = (position_ids[..., None].float() * self.inv_freq).flatten(2)
        return angles.cos(), angles.sin()


class PatchEmbed(nn.Module):
    """A 3-D convolution whose stride is its kernel: a linear layer on flattened patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.qwen2_vl_dim, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values)


class VisionBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=_NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, eps=_NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, sequences)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    """Attention within windows, or within whole images and frames."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences) -> Tensor:
        if isinstance(sequences, PackedSequences):
            return self._packed(x, cos, sin, sequences)
        return self._padded(x, cos, sin, sequences)

    def _packed(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: PackedSequences) -> Tensor:
        qkv = self.qkv(x).view(1, x.shape[1], 3 * self.heads, self.head_dim)
        rotated = rotate(qkv[:, :, : 2 * self.heads].transpose(1, 2), cos, sin).transpose(1, 2)[0]  # [P, 2 H, D]
        q, k = rotated.chunk(2, dim=1)
        y = packed_attention(q, k, qkv[0, :, 2 * self.heads :], sequences.cu_seqlens, sequences.max_seqlen)
        return self.proj(y.reshape(x.shape))

    def _padded(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: PaddedSequences) -> Tensor:
        windows, slots, width = x.shape
        q, k, v = (
            t.view(windows, slots, self.heads, self.head_dim).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )  # each [W, H, S, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        index, position = sequences.index, sequences.position
        if index is None or position is None:
            y = ragged_attention(q, k, v, sequences.lengths, causal=False)
            return self.proj(y.transpose(1, 2).reshape(windows, slots, width))
        q, k, v = (
            t.transpose(1, 2).reshape(windows * slots, self.heads, self.head_dim)[index].transpose(1, 2)
            for t in (q, k, v)
        )  # each [B, H, N, D]
        y = ragged_attention(q, k, v, sequences.lengths, causal=False)
        return self.proj(y.transpose(1, 2).reshape(-1, width)[position])


class PatchMerger(nn.Module):
    """Joins each merge group of patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size, eps=_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[W, S, C]`` to ``[W * S / merge unit, out]``."""
        return self.mlp(self.ln_q(x).reshape(-1, self.width))
