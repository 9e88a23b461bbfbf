"""Which format a checkpoint's weights are in, and which of its tensors hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import CheckpointError

from .awq import AWQ
from .compressed_tensors import CompressedTensors
from .gptq import GPTQ
from .linear import PackedWeight, QuantizedLinear
from .modelopt import ModelOptimizer
from .stored import Entry, Format, Layer, Settings

QUANTIZATION_FILE = "hf_quant_config.json"
"""Model Optimizer's, beside what newer releases of it write into ``config.json``."""

_FORMATS: dict[str, type[AWQ] | type[GPTQ] | type[CompressedTensors]] = {
    "awq": AWQ,
    "gptq": GPTQ,
    "compressed-tensors": CompressedTensors,
}
"""By ``quant_method``, but for Model Optimizer, which may have a file of its own."""
_REFUSED = {"bitsandbytes": "bitsandbytes", "fp8": "Transformers' block-wise FP8"}
_OLD_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
"""Of AutoGPTQ and AutoAWQ before they wrote into ``config.json``."""
_READABLE = "AWQ, GPTQ, compressed-tensors and NVIDIA Model Optimizer"
_LEAVES = frozenset(leaf for form in (*_FORMATS.values(), ModelOptimizer) for leaf in form.leaves) - {"weight"}


def stated_format(folder: Path) -> Format | None:
    """The format that the files of a checkpoint state; None where they state none, or Model Optimizer's FP8.

    Raises:
        CheckpointError: a method or a setting that is not read, or two methods.
    """
    config = read_json(folder / "config.json")
    raw = config.get("quantization_config")
    separate = (folder / QUANTIZATION_FILE).is_file()
    if raw is None and not separate:
        if isinstance(config.get("quantization"), dict):  # its group_size and bits
            raise _refused(folder, "MLX")
        for file, method in _OLD_FILES.items():
            if (folder / file).is_file():
                raise _refused(folder, f"{method}, which {file} says and config.json does not")
        return None
    settings = raw if isinstance(raw, dict) else {}
    stated = settings.get("quant_method")
    method = stated if isinstance(stated, str) else ""
    if separate and raw is not None and method != "modelopt":
        raise CheckpointError(
            f"{folder}: {QUANTIZATION_FILE} says NVIDIA Model Optimizer, quantization_config in config.json says"
            f" {method or 'no method'!r}; remove the one that is not true"
        )
    if separate:
        content = read_json(folder / QUANTIZATION_FILE).get("quantization")
        place, settings = f"{folder / QUANTIZATION_FILE}: quantization", content if isinstance(content, dict) else {}
    else:
        place = f"{folder / 'config.json'}: quantization_config"
    if method == "modelopt" or separate:
        form = ModelOptimizer.of(Settings(place, settings))
        return None if form.algorithm == "FP8" else form
    if not method and "group_size" in settings and "bits" in settings:  # MLX writes its table under both names
        raise _refused(folder, "MLX")
    if method not in _FORMATS:
        loaded = 8 if settings.get("load_in_8bit") else 4 if settings.get("load_in_4bit") else None  # bitsandbytes
        bits = settings.get("bits") or loaded
        name = _REFUSED.get(method, method) or "an unknown method"
        raise _refused(folder, f"{name} ({bits} bits)" if type(bits) is int else name)
    return _FORMATS[method].of(Settings(place, settings))


def _refused(folder: Path, method: str) -> CheckpointError:
    way_out = "Take the unquantised checkpoint: --precision fp8, int8, int4 or nvfp4 quantises it"
    if method.startswith("bitsandbytes"):
        way_out += ". In Transformers, model.dequantize() and save_pretrained make one"
    return CheckpointError(f"{folder} is quantised by {method}; {_READABLE} can be read. {way_out}")


def packed_weights(
    folder: Path, form: Format, entries: Mapping[str, Entry], load: Callable[[str], Tensor]
) -> tuple[dict[str, PackedWeight], set[str]]:
    """The weights that a checkpoint holds in other tensors, by name, and the names of those.

    Args:
        form: the checkpoint's :func:`stated_format`.
        entries: of all its tensors.
        load: reads one.

    Raises:
        CheckpointError: no quantised layer; a tensor of one missing, of another shape or type, or left over.
    """
    place = f"{folder} ({form.method})"
    owned: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        owner, _, leaf = name.rpartition(".")
        if leaf in form.leaves:
            owned.setdefault(owner, {})[leaf] = entry
    owned = {name: leaves for name, leaves in owned.items() if form.is_quantized(leaves)}
    if not owned:
        raise CheckpointError(
            f"{place}: no layer is quantised, but config.json says so. Fetch the weights that belong to it"
        )
    parts = {f"{name}.{leaf}" for name, leaves in owned.items() for leaf in leaves}
    for name, entry in entries.items():
        owner, _, leaf = name.rpartition(".")
        plain = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
        twice = leaf == "weight" and owner in owned
        if name not in parts and (leaf in _LEAVES or not plain or twice):
            raise CheckpointError(
                f"{place}: tensor {name} ({entry.dtype} {list(entry.shape)}) is no part of a layer in this format;"
                " checkpoints of mixed methods are not read. Take the unquantised one"
            )
    plain_entries = [entry for name, entry in entries.items() if name not in parts]
    dtype = max(plain_entries, key=lambda entry: math.prod(entry.shape)).dtype if plain_entries else torch.bfloat16
    weights = {}
    for name, leaves in owned.items():
        layer = Layer(name, place, leaves, load)
        weights[f"{name}.weight"] = PackedWeight(
            form.shape(layer), dtype, form.numbers(layer), partial(_read, form, layer)
        )
    return weights, parts


def _read(form: Format, layer: Layer) -> QuantizedLinear:
    weight = form.read(layer)
    scales = weight.scales.float()
    if not (scales.isfinite() & (scales >= 0)).all():
        raise CheckpointError(
            f"{layer.place}: {layer.name} has a scale that is negative or no finite number. Fetch the checkpoint again,"
            " or take the unquantised one"
        )
    return weight
