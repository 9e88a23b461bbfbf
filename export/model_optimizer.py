"""NVIDIA Model Optimizer over Transformers' model: what it is calibrated with, and how it is called."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, Qwen2VLError, reason, require
from qwen2vl_trt.windows import Grid

from .importable_torchvision import allow_torchvision


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
        "calibration",
        "quantize",
        {"modelopt": "NVIDIA Model Optimizer (nvidia-modelopt)", "requests": "requests"},
    )
    from importlib.metadata import version

    return version("nvidia-modelopt")


@contextlib.contextmanager
def model_optimizer(checkpoint: Checkpoint) -> Iterator[None]:
    """Within it Model Optimizer prints nothing, and what it raises is one of this project's errors.

    Raises:
        MissingDependencyError: see :func:`check_quantizer`.
        BuildError: it fails.
        OSError: files cannot be written.
    """
    version = check_quantizer()
    try:
        allow_torchvision()
        with _quiet(), torch.no_grad():
            yield
    except (Qwen2VLError, OSError):
        raise
    except Exception as error:  # Model Optimizer, Transformers and safetensors have no common base
        said = reason(error) or type(error).__name__
        raise BuildError(f"Model Optimizer {version} cannot quantise {checkpoint.folder}: {said}") from error


def calibrated_model(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    samples: Iterable[CalibrationSample],
    device: str,
    on_sample: Callable[[], None],
) -> Any:
    """Transformers' model in BF16 with Model Optimizer's quantisers in it, which have seen the samples.

    To be called within :func:`model_optimizer`.

    Args:
        config: of ``modelopt.torch.quantization.quantize``.
        device: where the model is. It is held whole: 17 GB for 7B.
        on_sample: called after each sample, as often as the algorithm of the configuration takes it.
    """
    import modelopt.torch.quantization as mtq
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]  # Model Optimizer asks; a folder of random weights has none
    model.eval().to(torch.device(device))

    def calibrate(model: Any) -> None:
        for sample in samples:
            model(**arguments_of(sample, device), use_cache=False)
            on_sample()

    return mtq.quantize(model, config, calibrate)


def arguments_of(sample: CalibrationSample, device: str) -> dict[str, Tensor]:
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
