"""Arithmetic and bytes of a Qwen2.5-VL, in closed form from its configuration.

A multiplication and an addition are two operations. Matrix products are counted apart from the products inside
attention, which stay in BF16 whatever the precision of the weights. Norms, rotary angles and activations are left
out: under 1% of the operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_trt.config import Qwen2VLConfig, TextConfig, VisionConfig

BF16 = 2
"""Bytes of a value."""
LAYER_BYTES = {"bf16": 2, "fp8": 1, "int8": 1 + 2 / 128, "int4": 0.5 + 2 / 128, "nvfp4": 0.5 + 1 / 16}
"""Of a weight of the decoder's layers, with its part of a scale, by precision; groups of 128, NVFP4's of 16."""


@dataclass(frozen=True)
class Flops:
    """Operations in matrix products with weights, and inside attention."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


def vision_flops(config: VisionConfig, rows: int, columns: int) -> Flops:
    """The vision tower over one image of ``rows`` x ``columns`` patches; border windows count as small as they are."""
    patches, width = rows * columns, config.hidden_size
    full = len(config.fullatt_block_indexes)
    side = config.window_groups * config.spatial_merge_size
    # A patch meets every patch of its window: windows form a grid, so the sum of squares is a product of two sums.
    pairs = _squares(rows, side) * _squares(columns, side)
    return Flops(
        linear=2.0 * patches * (vision_weights(config) - _merger_weights(config))
        + 2.0 * patches / config.merge_unit * _merger_weights(config),
        attention=4.0 * width * ((config.depth - full) * pairs + full * patches**2),
    )


def _squares(length: int, side: int) -> int:
    return length // side * side**2 + (length % side) ** 2


def vision_weights(config: VisionConfig) -> int:
    """Weights of the tower's matrices: patch embedding, blocks, merger."""
    return config.qwen2_vl_dim * config.hidden_size + vision_block_weights(config) + _merger_weights(config)


def vision_block_weights(config: VisionConfig) -> int:
    """Those of all blocks: q, k, v and output; gate, up and down."""
    return config.depth * config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)


def _merger_weights(config: VisionConfig) -> int:
    merged = config.merge_unit * config.hidden_size
    return merged * merged + merged * config.out_hidden_size


def layer_weights(config: TextConfig) -> int:
    """Weights of one decoder layer's matrices."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (2 * heads + 2 * kv_heads)  # q and output; k and v
    return attention + 3 * config.hidden_size * config.intermediate_size


def head_weights(config: TextConfig) -> int:
    """Weights of the output projection, as many as the embedding table has."""
    return config.vocab_size * config.hidden_size


def prefill_flops(config: TextConfig, tokens: int) -> Flops:
    """The decoder over a prompt, with the logits of its last token."""
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    return Flops(
        linear=2.0 * tokens * layers * layer_weights(config) + 2.0 * head_weights(config),
        attention=layers * 4.0 * width * tokens * (tokens + 1) / 2,  # causal
    )


def decode_flops(config: TextConfig, batch: int, context: float) -> Flops:
    """One token of every one of ``batch`` answers, each after ``context`` tokens."""
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    return Flops(
        linear=2.0 * batch * (layers * layer_weights(config) + head_weights(config)),
        attention=layers * 4.0 * width * batch * context,
    )


def kv_bytes_per_token(config: TextConfig, value_bytes: int = BF16) -> int:
    """Keys and values of one token in every layer."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * value_bytes


def decode_weight_bytes(config: TextConfig, weight_bytes: float, head_bytes: int = BF16) -> float:
    """What a decode step reads of the weights: every layer, and the output projection, which is not quantised."""
    return config.num_hidden_layers * layer_weights(config) * weight_bytes + head_weights(config) * head_bytes


def decoder_bytes(config: TextConfig, weight_bytes: float) -> float:
    """The decoder in memory: what :func:`decode_weight_bytes` counts, and the embedding table unless it is tied."""
    table = 0 if config.tie_word_embeddings else head_weights(config) * BF16
    return decode_weight_bytes(config, weight_bytes) + table


def prompt_tokens(config: Qwen2VLConfig, rows: int, columns: int, text: int) -> int:
    """Tokens of a prompt with one image: text, the image's tokens, and the two that enclose them."""
    return text + rows * columns // config.vision.merge_unit + 2
