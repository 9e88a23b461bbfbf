"""From the options of a command to the folder of its engines, the same way for every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from engines.arguments import BuildPlan, built_folder, plan_build
from engines.build import build_engines

from .backends.runners import default_device
from .calibration import CalibrationData
from .quantized_model import quantize_first

OwnData = Callable[[int], CalibrationData]
"""Makes the tiny model's calibration data of a size."""


def engine_folder(arguments: argparse.Namespace, own_data: OwnData) -> Path:
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
    build_planned(plan, own_data)
    return plan.folder


def build_planned(plan: BuildPlan, own_data: OwnData) -> bool:
    """Quantise and build what is missing; whether anything was built. Raises as :func:`engine_folder`."""
    plan = quantize_first(plan, own_data)
    return build_engines(plan.model, plan.backend, plan.precision, plan.profile, plan.folder, plan.force)
