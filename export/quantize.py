"""Quantise a checkpoint to FP8 with NVIDIA Model Optimizer, into its unified Hugging Face checkpoint.

Model Optimizer runs Transformers' model over calibration samples and records the largest input of every linear layer.
Its default configuration leaves a vision tower as it is; ours quantises the linear layers of every block of both.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import INDEX_FILE, Checkpoint
from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import BuildError, Qwen2VLError, reason, require
from qwen2vl_trt.quantization import fp8_layers
from qwen2vl_trt.windows import Grid

from .importable_torchvision import allow_torchvision

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


@dataclass(frozen=True)
class CalibrationSample:
    """One prompt with its media, as the model takes it.

    Attributes:
        token_ids: ``[S]`` int64, vision tokens expanded.
        position_ids: ``[3, S]`` int64.
        images: ``[P, qwen2_vl_dim]`` patches of all images, merge group by merge group in raster order.
        image_grids: of each.
        videos: likewise.
        video_grids: of each.
    """

    token_ids: Tensor
    position_ids: Tensor
    images: Tensor | None
    image_grids: Sequence[Grid]
    videos: Tensor | None
    video_grids: Sequence[Grid]


def check_quantizer() -> str:
    """The installed version of Model Optimizer.

    Raises:
        MissingDependencyError: it, or a package that it needs, is not installed.
    """
    require(
        "quantising to FP8",
        "quantize",
        {"modelopt": "NVIDIA Model Optimizer (nvidia-modelopt)", "requests": "requests"},
    )
    from importlib.metadata import version

    return version("nvidia-modelopt")


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
        MissingDependencyError: see :func:`check_quantizer`.
        BuildError: Model Optimizer fails, or the disk is full.
        CheckpointError: a scale came out zero or not a number, named: the samples never reached that layer.
    """
    version = check_quantizer()
    try:
        allow_torchvision()
        with _quiet():
            _run_model_optimizer(checkpoint, folder, samples, device, on_sample, vision)
        _restore_companions(checkpoint, folder)
    except OSError as error:
        raise BuildError(f"{folder}: {reason(error)}; nothing that loads was left there") from None
    except Qwen2VLError:
        raise
    except Exception as error:  # Model Optimizer, Transformers and safetensors have no common base
        said = reason(error) or type(error).__name__
        raise BuildError(f"Model Optimizer {version} cannot quantise {checkpoint.folder}: {said}") from error
    quantized = Checkpoint(folder)
    fp8_layers(quantized)
    return quantized


def _run_model_optimizer(
    checkpoint: Checkpoint,
    folder: Path,
    samples: Iterable[CalibrationSample],
    device: str,
    on_sample: Callable[[], None],
    vision: bool,
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]  # Model Optimizer asks; a folder of random weights has none
    model.eval().to(torch.device(device))

    def calibrate(model: Any) -> None:
        for sample in samples:
            model(**_arguments(sample, device), use_cache=False)
            on_sample()

    with torch.no_grad():
        mtq.quantize(model, fp8_config(vision), calibrate)
        export_hf_checkpoint(model, export_dir=folder)


def _arguments(sample: CalibrationSample, device: str) -> dict[str, Tensor]:
    """What Transformers' model takes."""
    ids = sample.token_ids[None].to(device)
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": sample.position_ids[:, None].to(device),
    }
    for patches, grids, names in (
        (sample.images, sample.image_grids, ("pixel_values", "image_grid_thw")),
        (sample.videos, sample.video_grids, ("pixel_values_videos", "video_grid_thw")),
    ):
        if patches is not None:
            arguments |= {
                names[0]: patches.to(device, torch.bfloat16),
                names[1]: torch.tensor(list(grids), device=device),
            }
    return arguments


def _restore_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Keep the model's own files: Transformers has written some of them anew, in its newest layout."""
    quantization = read_json(folder / "config.json")["quantization_config"]
    for source in checkpoint.companions:
        if source.name != INDEX_FILE:
            shutil.copyfile(source, folder / source.name)
    config = read_json(folder / "config.json") | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for weights in folder.glob("*.safetensors"):  # which safetensors leaves to its writer alone
        weights.chmod((folder / "config.json").stat().st_mode)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what both libraries print: stdout is for answers, and no user can act on the rest."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
