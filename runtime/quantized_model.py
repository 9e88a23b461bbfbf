"""From a model to its FP8 checkpoint, made once and found again.

The checkpoint lies in ``artifacts/<model>-fp8``. A record that is written into it before it gets that name says what it
was made from: a folder of that name is whole, and another model or other calibration data makes it anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock

from engines.arguments import BuildPlan
from engines.progress import progress_bar
from export.quantize import check_quantizer, quantize_checkpoint
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import read_json
from qwen2vl_trt.errors import BuildError, CheckpointError
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.quantization import fp8_layers

from .calibration import Calibration, CalibrationData

RECORD = "calibration.json"


@dataclass(frozen=True)
class _Record:
    """What a quantised checkpoint was made from, and its own hash."""

    model_hash: str
    calibration: str
    samples: int
    quantized_hash: str = ""


def quantize_first(plan: BuildPlan, own_data: Callable[[int], CalibrationData]) -> BuildPlan:
    """Replace a model that is to be built in FP8 by its quantised checkpoint, made where it is missing.

    Args:
        plan: as it is where it is for another precision, or the model is quantised already.
        own_data: makes the tiny model's calibration data of a size.

    Raises:
        BuildError: no calibration data for this model, or something wrong with them; the folder cannot be written.
        MissingDependencyError: Model Optimizer is needed and not installed.
        CheckpointError: the model cannot be read.
    """
    if plan.calibration is None or fp8_layers(checkpoint := Checkpoint(plan.model.folder)):
        return plan
    folder, size = plan.calibration.folder, plan.calibration.size
    vision = plan.backend.precision(plan.precision).fp8_vision
    if folder is not None:
        data = CalibrationData.from_folder(folder, size)
    elif plan.model.name == "tiny":
        data = own_data(size)
    else:
        raise BuildError(
            f"quantising {plan.model.name} to FP8 needs images like those it will see: --calibration-data DIR"
        )
    return replace(plan, model=replace(plan.model, folder=quantized_folder(plan.model, checkpoint, data, vision)))


def quantized_folder(model: ResolvedModel, checkpoint: Checkpoint, data: CalibrationData, vision: bool = True) -> Path:
    """The folder of a model's FP8 checkpoint, of the decoder alone without ``vision``; raises as
    :func:`quantize_first`.
    """
    folder = Path("artifacts") / f"{model.name}-fp8{'' if vision else '-decoder'}"
    wanted = _Record(checkpoint.hash, data.identity, len(data.requests))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):  # two at once: the second finds the first one's work
            if not _is_made(wanted, folder):
                _make(wanted, folder, checkpoint, data, vision)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror or error}; nothing that loads was left there") from None
    return folder


def _is_made(wanted: _Record, folder: Path) -> bool:
    if not folder.exists():
        return False
    if not (folder / RECORD).is_file():
        raise BuildError(f"{folder} is not a checkpoint that was quantised here (it has no {RECORD}); move it away")
    try:
        found = _Record(**read_json(folder / RECORD))
        return replace(found, quantized_hash="") == wanted and Checkpoint(folder).hash == found.quantized_hash
    except (CheckpointError, TypeError):
        return False


def _make(wanted: _Record, folder: Path, checkpoint: Checkpoint, data: CalibrationData, vision: bool) -> None:
    check_quantizer()
    calibration = Calibration(checkpoint, data)
    calibration.check()
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        with progress_bar() as progress:
            task = progress.add_task("calibrating", total=len(data.requests))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            made = quantize_checkpoint(
                checkpoint, unfinished, calibration, device, lambda: progress.advance(task), vision
            )
        record = json.dumps(asdict(replace(wanted, quantized_hash=made.hash)), indent=2)
        (unfinished / RECORD).write_text(record, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
