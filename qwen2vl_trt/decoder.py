"""The decoder with a static key-value cache; prefill, chunked prefill and decode are the same forward.

Letters: B batch, S new tokens, M cache capacity, H query heads, Hkv key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextConfig
from .layers import BlockedLinear, RMSNorm, SwiGLU
from .mrope import rotary_cos_sin, rotary_frequencies
from .ops import ragged_attention, rotate, update_cache


class DecoderOutput(NamedTuple):
    """``logits [B, V]`` FP32 of each row's last token, ``hidden_states [B, S, C]`` after the final norm, the caches."""

    logits: Tensor
    hidden_states: Tensor
    k_caches: list[Tensor]
    v_caches: list[Tensor]


class LayerCache(Protocol):
    """One layer's part of the cache: ``k`` and ``v``, where to write and how to attend."""

    @property
    def k(self) -> Tensor: ...

    @property
    def v(self) -> Tensor: ...

    @property
    def slot_mapping(self) -> Tensor | None:
        """Where the step's tokens go, ``[T]`` int64, for a kernel that writes to the cache itself; None: use
        ``append``. ``k`` and ``v`` are then ``[pages, page size, Hkv, D]``, and a number is the page times the page
        size, plus the place in the page."""
        ...

    def append(self, k: Tensor, v: Tensor) -> LayerCache:
        """The cache with the keys and values ``[B, Hkv, S, D]`` of the step's tokens."""
        ...

    def attend(self, q: Tensor) -> Tensor:
        """Causal attention of the step's queries ``[B, H, S, D]``."""
        ...


class CacheView(NamedTuple):
    """The cache of the graph: see :meth:`Decoder.forward`."""

    k: Tensor
    v: Tensor
    start: Tensor
    kv_lengths: Tensor

    @property
    def slot_mapping(self) -> None:
        return None

    def append(self, k: Tensor, v: Tensor) -> CacheView:
        return self._replace(k=update_cache(self.k, k, self.start), v=update_cache(self.v, v, self.start))

    def attend(self, q: Tensor) -> Tensor:
        return ragged_attention(q, self.k, self.v, self.kv_lengths, causal=True)


class Decoder(nn.Module):
    """Qwen2.5-VL's language model. Parameter names are the checkpoint's: ``model.*`` and ``lm_head.weight``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding's weight with ``lm_head`` where the configuration says so; again after loading."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache_start: Tensor,
        kv_lengths: Tensor,
        last_token: Tensor,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
    ) -> DecoderOutput:
        """Append S tokens to every row; logits of each row's last one.

        A row with fewer new tokens is padded on the right: padding is written beyond the row's length and overwritten
        by its next step.

        Args:
            inputs_embeds: ``[B, S, C]``.
            position_ids: ``[3, B, S]`` int64, M-RoPE positions.
            cache_start: ``[B]`` int64, tokens already in the cache.
            kv_lengths: ``[B]`` int64, ``cache_start + S``.
            last_token: ``[B]`` int64, index in S of each row's last real token.
            k_caches: one ``[B, Hkv, M, D]`` a layer, as ``v_caches``; updated in place when run eagerly.
        """
        views = [CacheView(k, v, cache_start, kv_lengths) for k, v in zip(k_caches, v_caches)]
        hidden_states, caches = self.model(inputs_embeds, position_ids, views)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.lm_head(hidden_states[rows, last_token]).float()
        return DecoderOutput(logits, hidden_states, [c.k for c in caches], [c.v for c in caches])


class DecoderStack(nn.Module):
    """Embedding table, layers, final norm."""

    inv_freq: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        inv_freq, self.rotary_scale = rotary_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, caches: Sequence[LayerCache] | None = None
    ) -> tuple[Tensor, list[LayerCache]]:
        """``[B, S, C]`` to hidden states ``[B, S, C]`` and the updated caches; without caches, whole prompts."""
        cos, sin = rotary_cos_sin(position_ids, self.inv_freq, self.config.mrope_section, self.rotary_scale)
        x, updated = inputs_embeds, []
        if torch.compiler.is_exporting() and not any(isinstance(each, BlockedLinear) for each in self.modules()):
            # [B * S, C]: a linear layer is then one Gemm over the weight as it is stored, which no backend has to turn.
            # Weights of 4 and 8 bits are stored turned, and ONNX Runtime would fuse a Gemm with the bias instead.
            x = x.flatten(0, 1)
        for index, layer in enumerate(self.layers):
            x, cache = layer(x, cos, sin, caches[index] if caches is not None else None)
            updated.append(cache)
        return self.norm(x).view(inputs_embeds.shape), updated


class DecoderLayer(nn.Module):
    """Pre-norm grouped-query attention and SwiGLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        y, cache = self.self_attn(self.input_layernorm(x), cos, sin, cache)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class DecoderAttention(nn.Module):
    """Grouped-query attention; q, k and v have a bias."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        q, k, v = self.heads(x, cos, sin)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            cache = cache.append(k, v)
            y = cache.attend(q)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1)), cache

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[B, H, S, D]``, rotated keys and values ``[B, Hkv, S, D]``.

        Of ``x [B, S, C]``, or ``[B * S, C]`` where a graph is traced; ``cos`` and ``sin`` are ``[B, S, D / 2]``.
        """
        q, k, v = (
            proj(x).view(*cos.shape[:2], -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v
