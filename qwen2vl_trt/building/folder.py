"""From a request to the folder of its engines, the same way for every command and for ``Pipeline.from_pretrained``."""

from __future__ import annotations

import logging
from pathlib import Path

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.build import build_engines, engines_in
from qwen2vl_trt.runtime.backends.runners import runner_module
from qwen2vl_trt.runtime.model_files import ModelFiles
from qwen2vl_trt.runtime.options import PipelineOptions

from .plan import BuildPlan, BuildRequest, built_folder, plan_build

logger = logging.getLogger(__name__)


def engine_folder(request: BuildRequest, options: PipelineOptions | None = None) -> Path:
    """``engine_dir`` as it is, unless a model is named too; else the model's engines, built where missing.

    Args:
        request: see there.
        options: of the pipeline that will open them.

    Raises:
        BuildError: other engines are there than are asked for; they cannot be built.
        CheckpointError: the model cannot be found, or used.
        EngineError: ``engine_dir`` holds no engines, or the backend does not run on this machine.
        MissingDependencyError: a package is not installed.
    """
    folder = built_folder(request)
    if folder is not None:
        return folder
    plan = plan_build(request)
    if request.device is None:
        runner_module(plan.backend).default_device()  # ends here, before the minutes of a build, where it cannot run
    build_planned(plan, options)
    return plan.folder


def build_planned(plan: BuildPlan, options: PipelineOptions | None = None) -> bool:
    """Quantise and build what is missing; whether anything was built. Raises as :func:`engine_folder`."""
    force = plan.request.force
    if force or engines_in(plan.folder) is None:
        ModelFiles.read(plan.model.folder, Qwen2VLConfig.from_folder(plan.model.folder), plan.profile, options)
        chosen = [] if plan.request.backend else [f"backend {plan.backend.name}"]
        chosen += [] if plan.request.precision else [f"precision {plan.precision}"]
        if chosen:
            logger.info("building %s: %s by default", plan.folder, ", ".join(chosen))
    from .quantized_model import quantize_first  # the export's packages, which engines that are there do not need

    plan = quantize_first(plan)
    return build_engines(plan.model, plan.backend, plan.precision, plan.profile, plan.folder, force, plan.adapter)
