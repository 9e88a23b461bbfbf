"""Quantise the weights of a decoder's linear layers to 4 or 8 bits, into a checkpoint of compressed-tensors.

``lm_head``, embeddings and the vision tower stay as they are. The files are those of the model, written a tensor at a
time. What they hold is in :mod:`qwen2vl_trt.quantized.writer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, write_tensors
from qwen2vl_trt.errors import BuildError, CheckpointError
from qwen2vl_trt.quantized.linear import NVFP4_BLOCK, Numbers
from qwen2vl_trt.quantized.writer import WeightFormat
from qwen2vl_trt.weights import checkpoint_names

from .quantize import copy_companions

JOINED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The linear layers of a decoder block; those of one input are one layer in vLLM."""
_PLAIN = ["re:.*lm_head", r"re:.*visual\..*"]
"""Linear layers that stay as they are, in the names of vLLM and of Transformers."""

Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""What becomes of tensors before they are written, by our names."""


def decoder_linears(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """The layers that are quantised, by our names, each with those that are one layer in vLLM."""
    found: dict[str, tuple[str, ...]] = {}
    for i in range(checkpoint.config.text.num_hidden_layers):
        for group in JOINED:
            names = tuple(f"model.layers.{i}.{name}" for name in group)
            found |= dict.fromkeys(names, names)
    return found


def weight_format(checkpoint: Checkpoint, numbers: Numbers) -> WeightFormat:
    """How the layers of a model are to be stored.

    Raises:
        BuildError: widths that the numbers have no blocks for.
        CheckpointError: a layer is missing.
    """
    names = checkpoint_names(checkpoint)
    weights = [f"{layer}.weight" for layer in decoder_linears(checkpoint)]
    missing = [weight for weight in weights if weight not in names]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: tensor {missing[0]!r} is missing")
    form = WeightFormat.of(numbers, {checkpoint.locate(names[weight]).shape[1] for weight in weights})
    if numbers == "nvfp4" and form.group_size is None:
        raise BuildError(
            f"{checkpoint.folder}: NVFP4 has blocks of {NVFP4_BLOCK} input channels, which do not divide the widths of"
            " this decoder; int8 takes any"
        )
    return form


def quantize_weights(
    checkpoint: Checkpoint,
    folder: Path,
    numbers: Numbers,
    changes: Changes = MappingProxyType({}),
    on_layer: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Round a model's weights to nearest and write them.

    Args:
        checkpoint: in BF16, FP16 or FP32; what is not quantised keeps its type.
        folder: a new one, for the quantised checkpoint; whole only once this returns.
        changes: see there; a change keeps a tensor's shape.
        on_layer: called after each of :func:`decoder_linears`.

    Raises:
        BuildError, CheckpointError: see :func:`weight_format`; a layer has numbers that are not finite.
        OSError: the disk is full, or the folder cannot be written.
    """
    form = weight_format(checkpoint, numbers)
    names = checkpoint_names(checkpoint)
    layers = {
        names[f"{ours}.weight"]: tuple(names[f"{name}.weight"] for name in joined)
        for ours, joined in decoder_linears(checkpoint).items()
    }
    changed = {names[ours]: change for ours, change in changes.items()}

    def load(name: str) -> Tensor:
        tensor = checkpoint.load(name)
        return changed[name](tensor) if name in changed else tensor

    @cache
    def largest(joined: tuple[str, ...]) -> Tensor:
        return torch.stack([load(name).float().abs().max() for name in joined]).max()

    def parts(name: str, weight: Tensor) -> dict[str, Tensor]:
        """Of a tensor of the model, by whole names."""
        if name not in layers:
            return {name: weight}
        scale_dtype = torch.float16 if checkpoint.locate(name).dtype == torch.float16 else torch.bfloat16
        shared = largest(layers[name]) if numbers == "nvfp4" and not weight.is_meta else torch.ones(())
        tensors = form.tensors(weight, scale_dtype, shared)
        return {f"{name.removesuffix('weight')}{leaf}": tensor for leaf, tensor in tensors.items()}

    def written(here: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in here:
            tensors = parts(name, load(name))
            for each, tensor in tensors.items():
                if name in layers and tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise CheckpointError(f"{checkpoint.folder}: tensor {name!r} has numbers that are not finite")
                yield each, tensor
            if name in layers:
                on_layer()

    folder.mkdir()
    placed: dict[str, str] = {}
    size = 0
    for source in sorted(checkpoint.folder.glob("*.safetensors")):
        here = [name for name in checkpoint.names if checkpoint.locate(name).path == source.resolve()]
        entries: dict[str, Tensor] = {}
        for name in here:
            location = checkpoint.locate(name)
            entries |= parts(name, torch.empty(location.shape, dtype=location.dtype, device="meta"))
        if here:
            write_tensors(folder / source.name, entries, written(here))
            placed |= dict.fromkeys(entries, source.name)
            size += sum(tensor.nbytes for tensor in entries.values())
    if set(placed.values()) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_companions(checkpoint, folder, form.settings(_PLAIN))
    return Checkpoint(folder)
