"""Activation-aware scaling (AWQ, https://arxiv.org/abs/2306.00978) of a decoder before its weights are rounded.

Model Optimizer's ``awq_lite`` searches factors for the input channels of every layer. Here they go into what precedes
the layer, as ``modelopt/torch/export/quant_utils.py`` (0.47) does it, but from the checkpoint's own weights in FP32:

- the mean of the factors of q, k and v into the norm before them, and that of gate and up likewise
  (``preprocess_linear_fusion``, ``fuse_prequant_layernorm``);
- those of down into the rows of up (``fuse_prequant_to_linear``).

``o_proj`` has none: heads that share a value head would want different ones of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.weights import checkpoint_names, our_name

from .model_optimizer import CalibrationSample, calibrated_model, model_optimizer
from .weight_only import JOINED, Changes, weight_format

_QKV, _, _GATE_UP, _DOWN = JOINED
PASSES = 2
"""Times that Model Optimizer takes every sample: for the inputs' sizes, and to try the factors."""


def awq_config(text: TextConfig, group_size: int | None) -> dict[str, Any]:
    """Model Optimizer's INT4_AWQ_CFG for the layers whose factors have a place.

    Args:
        group_size: input channels of a scale; None where all have one.
    """
    widths = dict.fromkeys((*_QKV, *_GATE_UP), text.hidden_size) | dict.fromkeys(_DOWN, text.intermediate_size)
    quantizers = [
        {
            "quantizer_name": f"*language_model.layers.*.{layer}.weight_quantizer",
            "cfg": {"num_bits": 4, "block_sizes": {-1: group_size or width}},
        }
        for layer, width in widths.items()
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *quantizers], "algorithm": "awq_lite"}


def awq_factors(
    checkpoint: Checkpoint,
    samples: Iterable[CalibrationSample],
    device: str = "cpu",
    on_sample: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """What the inputs of linear layers are best multiplied by, ``[in]`` FP32, by our names of the layers.

    Args:
        checkpoint: in BF16, FP16 or FP32.
        device: where the model runs. It is held whole: 17 GB for 7B.
        on_sample: called :data:`PASSES` times a sample.

    Raises:
        MissingDependencyError: see :func:`.model_optimizer.check_quantizer`.
        BuildError, CheckpointError: Model Optimizer fails; see :func:`.weight_only.weight_format`.
    """
    config = awq_config(checkpoint.config.text, weight_format(checkpoint, "int4").group_size)
    with model_optimizer(checkpoint):
        model = calibrated_model(checkpoint, config, samples, device, on_sample)
    factors = {}
    for name, module in model.named_modules():
        if getattr(module, "pre_quant_scale", None) is not None:
            layer = our_name(name.removesuffix(".input_quantizer"))
            factors[layer] = module.pre_quant_scale.float().cpu()
    return factors


@torch.no_grad()
def folded(checkpoint: Checkpoint, factors: Mapping[str, Tensor]) -> Changes:
    """What factors do to norms and weights: the same function, whose inputs of linear layers are multiplied by them.

    A norm is rounded to its own type, and the weights after it are divided by what that came to.

    Args:
        factors: :func:`awq_factors`.
    """
    names = checkpoint_names(checkpoint)
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for i in range(checkpoint.config.text.num_hidden_layers):
        block = f"model.layers.{i}"
        down = factors[f"{block}.{_DOWN[0]}"]
        changes[f"{block}.{_DOWN[0]}.weight"] = partial(_scaled, columns=1 / down)
        for norm, layers in (("input_layernorm", _QKV), ("post_attention_layernorm", _GATE_UP)):
            before = checkpoint.load(names[f"{block}.{norm}.weight"])
            mean = torch.stack([factors[f"{block}.{layer}"] for layer in layers]).mean(0)
            most = torch.finfo(before.dtype).max
            after = (before.float() * mean).clamp(-most, most).to(before.dtype)
            after = torch.where(after == 0, before, after)
            changes[f"{block}.{norm}.weight"] = partial(_replaced, after=after)
            columns = torch.where(after == 0, 1, before.float() / after.float())
            for layer in layers:
                rows = down if layer == "mlp.up_proj" else None
                changes[f"{block}.{layer}.weight"] = partial(_scaled, columns=columns, rows=rows)
    return changes


def _replaced(before: Tensor, after: Tensor) -> Tensor:
    return after


def _scaled(weight: Tensor, columns: Tensor, rows: Tensor | None = None) -> Tensor:
    scaled = weight.float() * columns
    return scaled if rows is None else scaled.mul_(rows[:, None])
