"""From a model to its quantised checkpoint in ``artifacts/<model>-<precision>``, made once and found again.

A record in it says what it was made from; a folder of that name is whole. One of another model or of other calibration
data stays, unless ``--force`` replaces it. Engines have the record too, and serve without the checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from rich.progress import Progress

from qwen2vl_trt.checkpoint import RECORD, Checkpoint
from qwen2vl_trt.config import read_json
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.precision import Precision
from qwen2vl_trt.engines.profile import flag
from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.errors import BuildError, CheckpointError, EngineError, reason
from qwen2vl_trt.export.awq import PASSES, awq_factors, folded
from qwen2vl_trt.export.model_optimizer import CalibrationSample, check_quantizer
from qwen2vl_trt.export.quantize import quantize_checkpoint
from qwen2vl_trt.export.weight_only import Changes, decoder_linears, quantize_weights
from qwen2vl_trt.export.weights import merged_checkpoint
from qwen2vl_trt.hub import TINY
from qwen2vl_trt.quantization import fp8_layers

from .calibration import Calibration, CalibrationData, training_data
from .plan import BuildPlan

CALIBRATION_SIZES = {"max": 512, "awq": 128}
"""By Model Optimizer's algorithm. AWQ tries eleven factors on every layer with every sample."""


@dataclass(frozen=True)
class _Record:
    """What a quantised checkpoint was made from, and its own hash; ``lora_hash`` of the adapter merged before.

    ``method`` is Model Optimizer's ``max`` or ``awq``, or ``rtn``: to nearest, without calibration.
    """

    model_hash: str
    calibration: str = ""
    samples: int = 0
    quantized_hash: str = ""
    lora_hash: str = ""
    method: str = "max"

    @classmethod
    def of(cls, folder: Path) -> _Record | None:
        """The record of a folder that is as it was made."""
        try:
            found = cls(**read_json(folder / RECORD))
            return found if Checkpoint(folder).hash == found.quantized_hash else None
        except (CheckpointError, TypeError):
            return None


def _method(plan: BuildPlan) -> str:
    """How weights are quantised where no checkpoint is there."""
    if _precision(plan).fp8:
        return "max"
    return (plan.request.quant_method or "awq") if _precision(plan).weights == "int4" else "rtn"


def _precision(plan: BuildPlan) -> Precision:
    return plan.backend.precision(plan.precision)


def _data(plan: BuildPlan, size: int) -> CalibrationData:
    if plan.request.calibration_data is not None:
        return CalibrationData.from_folder(plan.request.calibration_data, size)
    if plan.model.name == TINY:
        return training_data(size)
    without = "" if _precision(plan).fp8 else ". --quant-method rtn needs none, and loses more"
    raise BuildError(
        f"quantising {plan.model.name} to {plan.precision.upper()} needs images like those it will see:"
        f" --calibration-data DIR{without}"
    )


def _difference(plan: BuildPlan, checkpoint: Checkpoint, found: _Record) -> str | None:
    """What a quantised checkpoint was made of or how, in words, if it does not do."""
    request = plan.request
    if found.model_hash != checkpoint.hash:
        return "from another model"
    if found.lora_hash != _lora_hash(plan):
        return "from another adapter (--lora)" if found.lora_hash else "from the model without an adapter"
    calibrated = request.calibration_data is not None or request.calibration_size is not None
    if found.method != _method(plan) and (request.quant_method is not None or calibrated):
        return f"by another method ({found.method})"
    if not calibrated:
        return None
    data = _data(plan, request.calibration_size or found.samples)
    same = (found.calibration, found.samples) == (data.identity, len(data.requests))
    return None if same else f"from other calibration data ({found.samples} samples)"


def _lora_hash(plan: BuildPlan) -> str:
    return plan.adapter.hash if plan.adapter else ""


def quantize_first(plan: BuildPlan) -> BuildPlan:
    """Replace a model that is to be built with quantised weights by its quantised checkpoint, made where it is missing.

    The plan stays as it is where it is for another precision, or the model is quantised already, in whatever format;
    the build refuses those that are not of the precision's numbers. Engines in its folder hold the quantised checkpoint
    that they were built from: it is the one, if it does.

    Raises:
        BuildError: no calibration data for this model, or something wrong with them, or some for a quantised one; a
            quantised checkpoint or engines are there that were made from something else; the folder cannot be written.
        MissingDependencyError: Model Optimizer is needed and not installed.
        CheckpointError: the model cannot be read.
    """
    precision, force = _precision(plan), plan.request.force
    if precision.weights is None:
        return plan
    checkpoint = Checkpoint(plan.model.folder)
    if checkpoint.format is not None or fp8_layers(checkpoint):
        for name in ("quant_method", "calibration_data", "calibration_size"):
            if getattr(plan.request, name) is not None:
                raise BuildError(
                    f"{flag(name)} is for an unquantised model, and {checkpoint.folder} is quantised: leave it out, or"
                    " give the unquantised one"
                )
        return plan
    engines = not force and _holds_engines(plan.folder)
    if engines and (built := _Record.of(plan.folder)):
        difference = _difference(plan, checkpoint, built)
        if difference:
            raise BuildError(
                f"{plan.folder} holds engines that were quantised {difference}. Pass --force to replace them, or"
                " give another --engine-dir"
            )
        return replace(plan, model=replace(plan.model, folder=plan.folder))
    decoder_alone = precision.fp8 and not precision.fp8_vision
    folder = Path("artifacts") / f"{plan.name}-{plan.precision}{'-decoder' if decoder_alone else ''}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):  # two at once: the second finds the first one's work
            _put_back(folder)
            _check_ours(folder)
            found = _Record.of(folder)
            difference = _difference(plan, checkpoint, found) if found else None
            if difference and not force:
                raise BuildError(f"{folder} was quantised {difference}; pass --force to make it anew")
            if engines and not found:  # here, before the hour of a calibration
                raise BuildError(
                    f"{plan.folder} holds engines that do not say what they were quantised from. Run them as they are"
                    " (--engine-dir without --model), or pass --force to replace them"
                )
            if difference or not found:
                _make(folder, checkpoint, plan)
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise BuildError(f"{folder}: {reason(error)}; what it held is unchanged") from None
    return replace(plan, model=replace(plan.model, folder=folder))


def _holds_engines(folder: Path) -> bool:
    try:
        Manifest.read(folder).verify(folder)
    except EngineError:
        return False
    return True


def _check_ours(folder: Path) -> None:
    if folder.exists() and not (folder / RECORD).is_file():
        raise BuildError(f"{folder} is not a checkpoint that was quantised here (it has no {RECORD}); move it away")


def _make(folder: Path, checkpoint: Checkpoint, plan: BuildPlan) -> None:
    method, adapter = _method(plan), plan.adapter
    record = _Record(checkpoint.hash, lora_hash=_lora_hash(plan), method=method)
    calibration: Iterable[CalibrationSample] = ()
    if method in CALIBRATION_SIZES:
        data = _data(plan, plan.request.calibration_size or CALIBRATION_SIZES[method])
        check_quantizer()
        samples = Calibration(checkpoint, data)
        samples.check()
        calibration = samples
        record = replace(record, calibration=data.identity, samples=len(data.requests))
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        with progress_bar(lines=True) as progress, ExitStack() as merging:
            source, merged = checkpoint, folder.with_name(f".{folder.name}.merged")
            if adapter is not None:
                shutil.rmtree(merged, ignore_errors=True)
                source = merging.enter_context(merged_checkpoint(checkpoint, adapter, merged))
            made = _quantize(source, unfinished, _precision(plan), record, calibration, progress)
        text = json.dumps(asdict(replace(record, quantized_hash=made.hash)), indent=2)
        (unfinished / RECORD).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(_older(folder))
        unfinished.rename(folder)
    finally:
        _put_back(folder)
        shutil.rmtree(unfinished, ignore_errors=True)


def _quantize(
    source: Checkpoint,
    folder: Path,
    precision: Precision,
    record: _Record,
    samples: Iterable[CalibrationSample],
    progress: Progress,
) -> Checkpoint:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changes: Changes = {}
    if record.samples:
        passes = PASSES if record.method == "awq" else 1
        task = progress.add_task("calibrating", total=passes * record.samples)
        on_sample = partial(progress.advance, task)
        if precision.fp8:
            return quantize_checkpoint(source, folder, samples, device, on_sample, precision.fp8_vision)
        changes = folded(source, awq_factors(source, samples, device, on_sample))
    assert precision.weight_only is not None
    rounding = progress.add_task("quantising", total=len(decoder_linears(source)))
    return quantize_weights(source, folder, precision.weight_only, changes, partial(progress.advance, rounding))


def _older(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.older")


def _put_back(folder: Path) -> None:
    """The older checkpoint, where the new one did not get its name; it is of no use where that one did."""
    if folder.exists():
        shutil.rmtree(_older(folder), ignore_errors=True)
    elif _older(folder).exists():
        _older(folder).rename(folder)
