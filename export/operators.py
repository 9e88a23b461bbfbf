"""From the project's torch operators to one standard ONNX node each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript.values import Opset

import qwen2vl_trt.ops  # noqa: F401  (registers the operators translated here)

OPSET = 24

_op = Opset("", OPSET)  # onnxscript ships no opset24 module; this names the same domain


def _update_cache(cache: Any, new: Any, start: Any) -> Any:
    return _op.TensorScatter(cache, new, start, axis=2, mode="linear")


def _ragged_attention(q: Any, k: Any, v: Any, lengths: Any, causal: bool) -> Any:
    # Attention has four outputs. TensorRT's parser drops both is_causal's corner and the lengths without a word:
    # engines/ sets them again on the parsed network.
    return _op.Attention(q, k, v, None, None, None, lengths, is_causal=int(causal))[0]


def _round_to_fp8(x: Any, scale: Any) -> Any:
    quantized = _op.QuantizeLinear(x, scale, output_dtype=onnx.TensorProto.FLOAT8E4M3FN)
    return _op.DequantizeLinear(quantized, scale, output_dtype=int(x.dtype))


def _dequantize_fp8(values: Any, scale: Any, like: Any) -> Any:
    return _op.DequantizeLinear(values, scale, output_dtype=int(like.dtype))


def _dequantize_blocks(values: Any, scales: Any, block_size: int) -> Any:
    if block_size == 0:
        return _op.DequantizeLinear(values, scales, axis=1)
    return _op.DequantizeLinear(values, scales, axis=0, block_size=block_size)


def translations() -> dict[Callable, Callable]:
    """The ``custom_translation_table`` of ``torch.onnx.export``."""
    return {
        torch.ops.qwen2vl_trt.update_cache.default: _update_cache,
        torch.ops.qwen2vl_trt.ragged_attention.default: _ragged_attention,
        torch.ops.qwen2vl_trt.round_to_fp8.default: _round_to_fp8,
        torch.ops.qwen2vl_trt.dequantize_fp8.default: _dequantize_fp8,
        torch.ops.qwen2vl_trt.dequantize_blocks.default: _dequantize_blocks,
    }
