"""The two graphs: their modules, inputs, outputs and dynamic dimensions, by name.

These names are the contract between ``export/``, ``engines/`` and ``runtime/``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.quantization import use_fp8
from qwen2vl_trt.vision import VisionTransformer

if TYPE_CHECKING:
    from .blocked_weights import BlockedLayer

INT = torch.int64


@dataclass(frozen=True)
class TensorSpec:
    """One input: a dimension is a number, or a name where it is dynamic."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Graph:
    """One graph to export.

    Attributes:
        prefix: what to put before the module's parameter names to get the checkpoint's.
        module: builds the module; called under the meta device.
        arguments: from the inputs' tensors, in order, to the module's keyword arguments.
    """

    name: str
    prefix: str
    module: Callable[[], nn.Module]
    inputs: dict[str, TensorSpec]
    outputs: tuple[str, ...]
    arguments: Callable[[list[Tensor]], dict[str, Any]]


def vision_graph(config: Qwen2VLConfig, dtype: torch.dtype, fp8: Set[str] = frozenset()) -> Graph:
    """Patches in window order to image embeddings, see :class:`qwen2vl_trt.windows.WindowLayout`; ``fp8`` layers."""
    inputs = {
        "pixel_values": TensorSpec(("windows", "slots", config.vision.qwen2_vl_dim), dtype),
        "window_lengths": TensorSpec(("windows",), INT),
        "position_ids": TensorSpec(("windows", "slots", 2), INT),
        "sequence_index": TensorSpec(("sequences", "longest"), INT),
        "sequence_lengths": TensorSpec(("sequences",), INT),
        "sequence_position": TensorSpec(("windows", "slots"), INT),
        "merge_index": TensorSpec(("tokens",), INT),
    }
    return Graph(
        name="vision",
        prefix="visual.",
        module=lambda: use_fp8(VisionTransformer(config.vision), "visual.", fp8),
        inputs=inputs,
        outputs=("image_embeds",),
        arguments=lambda tensors: dict(zip(inputs, tensors)),
    )


def decoder_graph(
    config: Qwen2VLConfig,
    dtype: torch.dtype,
    max_seq_len: int | None = None,
    fp8: Set[str] = frozenset(),
    blocked: Mapping[str, BlockedLayer] = MappingProxyType({}),
) -> Graph:
    """Prefill, chunked prefill and decode; see :meth:`qwen2vl_trt.decoder.Decoder.forward`.

    Args:
        max_seq_len: the cache capacity M; None leaves it dynamic (TensorRT refuses that, ONNX Runtime gains by it:
            its attention computes over the whole capacity, whatever is used).
        fp8: layers that compute in FP8.
        blocked: layers whose weights have 4 or 8 bits.
    """
    text = config.text
    layers = range(text.num_hidden_layers)
    cache = TensorSpec(("batch", text.num_key_value_heads, max_seq_len or "max_seq_len", text.head_dim), dtype)
    tokens = {
        "inputs_embeds": TensorSpec(("batch", "sequence", text.hidden_size), dtype),
        "position_ids": TensorSpec((3, "batch", "sequence"), INT),
        "cache_start": TensorSpec(("batch",), INT),
        "kv_lengths": TensorSpec(("batch",), INT),
        "last_token": TensorSpec(("batch",), INT),
    }
    k_caches, v_caches = cache_names(text.num_hidden_layers)

    def module() -> nn.Module:
        from .blocked_weights import use_blocked  # ONNX IR, which engines that are there run without

        return use_blocked(use_fp8(Decoder(text), "", fp8), blocked)

    return Graph(
        name="decoder",
        prefix="",
        module=module,
        inputs=tokens | dict.fromkeys((*k_caches, *v_caches), cache),
        outputs=("logits", "hidden_states", *(f"new_{name}" for name in (*k_caches, *v_caches))),
        arguments=lambda tensors: {
            **dict(zip(tokens, tensors)),
            "k_caches": tensors[len(tokens) : len(tokens) + len(layers)],
            "v_caches": tensors[len(tokens) + len(layers) :],
        },
    )


def cache_names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the key and value cache inputs; each has an output ``new_`` + name, aliased in place."""
    return [f"k_cache_{i}" for i in range(layers)], [f"v_cache_{i}" for i in range(layers)]
