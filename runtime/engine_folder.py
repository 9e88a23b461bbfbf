"""From the options of a command to the folder of its engines, the same way for every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.arguments import BuildPlan, built_folder, plan_build
from qwen2vl_trt.engines.build import build_engines, engines_in

from .backends.runners import default_device
from .calibration import CalibrationData
from .model_files import ModelFiles
from .options import PipelineOptions
from .quantized_model import quantize_first

OwnData = Callable[[int], CalibrationData]
"""Makes the tiny model's calibration data of a size."""


def engine_folder(arguments: argparse.Namespace, own_data: OwnData, options: PipelineOptions | None = None) -> Path:
    """``--engine-dir`` as it is, unless a model is named too; else the model's engines, built where missing.

    Raises:
        BuildError: other engines are there than the options ask for; they cannot be built.
        CheckpointError: the model cannot be found, or used.
        EngineError: ``--engine-dir`` holds no engines, or the backend does not run on this machine.
        MissingDependencyError: a package is not installed.
    """
    folder = built_folder(arguments)
    if folder is not None:
        return folder
    plan = plan_build(arguments)
    if arguments.device is None:
        default_device(plan.backend.name)  # ends here, before the minutes of a build, where it cannot run
    build_planned(plan, own_data, options)
    return plan.folder


def build_planned(plan: BuildPlan, own_data: OwnData, options: PipelineOptions | None = None) -> bool:
    """Quantise and build what is missing for a pipeline with these options; whether anything was built.

    Raises as :func:`engine_folder`.
    """
    if plan.force or engines_in(plan.folder) is None:
        ModelFiles.read(plan.model.folder, Qwen2VLConfig.from_folder(plan.model.folder), plan.profile, options)
    plan = quantize_first(plan, own_data)
    return build_engines(plan.model, plan.backend, plan.precision, plan.profile, plan.folder, plan.force)
