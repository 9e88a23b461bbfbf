"""Quantise a checkpoint to FP8 with NVIDIA Model Optimizer, into its unified Hugging Face checkpoint.

Model Optimizer runs Transformers' model over calibration samples and records the largest input of every linear layer.
Its default configuration leaves a vision tower as it is; ours quantises the linear layers of every block of both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qwen2vl_trt.checkpoint import INDEX_FILE, Checkpoint
from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import BuildError, reason
from qwen2vl_trt.quantization import fp8_layers

from .model_optimizer import CalibrationSample, calibrated_model, model_optimizer

_E4M3 = {"num_bits": (4, 3), "axis": None}
_DECODER, _VISION = "language_model.layers", "visual.blocks"


def fp8_config(vision: bool = True) -> dict[str, Any]:
    """Model Optimizer's FP8_DEFAULT_CFG for the blocks, of the decoder alone without ``vision``."""
    quantizers = [
        {"quantizer_name": f"*{part}.*{what}_quantizer", "cfg": _E4M3}
        for part in ((_DECODER, _VISION) if vision else (_DECODER,))
        for what in ("weight", "input")
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *quantizers], "algorithm": "max"}


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    samples: Iterable[CalibrationSample],
    device: str = "cpu",
    on_sample: Callable[[], None] = lambda: None,
    vision: bool = True,
) -> Checkpoint:
    """Calibrate a model and write it in FP8.

    Args:
        checkpoint: in BF16, FP16 or FP32; what is not quantised is written in BF16.
        folder: a new one, for the quantised checkpoint; whole only once this returns.
        device: where the model runs. It is held whole: 17 GB for 7B.
        on_sample: called after each sample.
        vision: quantise the vision tower too, not the decoder alone.

    Raises:
        MissingDependencyError: see :func:`.model_optimizer.check_quantizer`.
        BuildError: Model Optimizer fails, or the disk is full.
        CheckpointError: a scale came out zero or not a number, named: the samples never reached that layer.
    """
    try:
        with model_optimizer(checkpoint):
            from modelopt.torch.export import export_hf_checkpoint

            model = calibrated_model(checkpoint, fp8_config(vision), samples, device, on_sample)
            export_hf_checkpoint(model, export_dir=folder)
        copy_companions(checkpoint, folder, read_json(folder / "config.json")["quantization_config"])
        for weights in folder.glob("*.safetensors"):  # which safetensors leaves to its writer alone
            weights.chmod((folder / "config.json").stat().st_mode)
    except OSError as error:
        raise BuildError(f"{folder}: {reason(error)}; nothing that loads was left there") from None
    quantized = Checkpoint(folder)
    fp8_layers(quantized)
    return quantized


def copy_companions(checkpoint: Checkpoint, folder: Path, quantization: dict[str, Any]) -> None:
    """Copy the model's own files beside quantised weights (Transformers writes some anew, in its newest layout).

    Args:
        quantization: what ``config.json`` is to say of them.

    Raises:
        OSError: they cannot be written.
    """
    for source in checkpoint.companions:
        if source.name != INDEX_FILE:
            shutil.copyfile(source, folder / source.name)
    config = read_json(folder / "config.json") | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
