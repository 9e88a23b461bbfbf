"""FP8 checkpoints of NVIDIA Model Optimizer, whose layers compute in FP8. Source: ``modelopt/torch/export`` (0.47).

Checkpoints in other formats are read by :mod:`qwen2vl_trt.quantized`. Which layers are quantised is
known by their tensors: an E4M3 weight and two FP32 scalars, see :class:`qwen2vl_trt.layers.FP8Linear`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Set

import torch
from torch import nn

from .checkpoint import Checkpoint
from .config import read_json
from .errors import CheckpointError
from .layers import FP8Linear
from .quantized.formats import QUANTIZATION_FILE
from .weights import EMBEDDING, checkpoint_names

logger = logging.getLogger(__name__)

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SHOWN = 5  # names in an error message; the rest is counted


def fp8_layers(checkpoint: Checkpoint) -> frozenset[str]:
    """The linear layers that compute in FP8, by our names without ``.weight``. Reads no weight, only scales.

    Raises:
        CheckpointError: another quantisation than Model Optimizer's FP8, or a layer without two positive, finite scales
            of the whole tensor.
    """
    stated, names = _stated(checkpoint), checkpoint_names(checkpoint)
    weights = {ours: checkpoint.entry(theirs) for ours, theirs in names.items()}
    layers = frozenset(
        ours.removesuffix(".weight")
        for ours, location in weights.items()
        if location.dtype in _FP8 and ours.endswith(".weight")
    )
    if not stated:
        if layers:
            raise CheckpointError(
                f"{checkpoint.folder}: {names[min(layers) + '.weight']} is FP8, but neither {QUANTIZATION_FILE} nor"
                " config.json says how the checkpoint is quantised"
            )
        return layers
    if not layers:
        raise CheckpointError(f"{checkpoint.folder} is said to be quantised to FP8, but has no FP8 weight")
    if EMBEDDING.removesuffix(".weight") in layers:
        raise CheckpointError(
            f"{checkpoint.folder}: {names[EMBEDDING]} is FP8; only the weights of linear layers can be"
        )
    missing = [f"{layer}.{scale}" for layer in sorted(layers) for scale in FP8Linear.SCALES]
    missing = [scale for scale in missing if scale not in names]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: FP8 layers without a scale: {_listed(missing)} missing")
    wrong = []
    for layer in sorted(layers):
        if weights[f"{layer}.weight"].dtype != torch.float8_e4m3fn:
            wrong.append(f"{layer}.weight is {weights[f'{layer}.weight'].dtype}, not torch.float8_e4m3fn")
        for scale in FP8Linear.SCALES:
            wrong += _wrong_scale(checkpoint, names[f"{layer}.{scale}"])
    if wrong:
        raise CheckpointError(f"{checkpoint.folder}: {_listed(wrong)}; quantise the model again")
    return layers


def stored_weights(checkpoint: Checkpoint) -> str | None:
    """The precision (``fp8``, ``int4``, ``int8``, ``nvfp4``) that most quantised layers of a checkpoint are stored in.

    None where they are stored in none that layers compute with, or nothing is quantised. Raises as :func:`fp8_layers`.
    """
    if fp8_layers(checkpoint):
        return "fp8"
    numbers = Counter(weight.numbers for weight in checkpoint.packed.values())
    return numbers.most_common(1)[0][0] if numbers else None


def use_fp8(module: nn.Module, prefix: str, layers: Set[str]) -> nn.Module:
    """Replace the linear layers that a checkpoint holds in FP8; their values are loaded afterwards.

    Args:
        module: with parameters named ``prefix + name``; changed in place and returned. May be on the meta device.
        prefix: ``"visual."`` for the vision tower, ``""`` for the decoder.
        layers: :func:`fp8_layers`, the other half's too.

    Raises:
        CheckpointError: a quantised layer that is not linear, a norm say.
    """
    for name, child in list(module.named_modules()):
        if prefix + name in layers:
            if not isinstance(child, nn.Linear):
                raise CheckpointError(f"{prefix}{name}.weight is FP8; only the weights of linear layers can be")
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, FP8Linear(child))
    return module


def _stated(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says that it is quantised to FP8."""
    path = checkpoint.folder / QUANTIZATION_FILE
    if path.is_file():
        raw = read_json(path).get("quantization")
    else:
        raw = read_json(checkpoint.folder / "config.json").get("quantization_config")
        if raw is None:
            return False
    stated = raw if isinstance(raw, dict) else {}
    cache = stated.get("kv_cache_quant_algo") or stated.get("kv_cache_scheme")
    if cache:
        message = "%s asks for a quantised key-value cache (%s); here it stays in the decoder's type"
        logger.warning(message, checkpoint.folder, cache)
    return checkpoint.format is None


def _wrong_scale(checkpoint: Checkpoint, name: str) -> list[str]:
    location = checkpoint.locate(name)
    if location.dtype != torch.float32 or math.prod(location.shape) != 1:
        return [f"{name} is {location.dtype} {list(location.shape)}, not one FP32 number"]
    value = float(checkpoint.load(name))
    return [] if math.isfinite(value) and value > 0 else [f"{name} is {value}"]


def _listed(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
