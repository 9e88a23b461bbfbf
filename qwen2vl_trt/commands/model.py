"""From a command's options to a pipeline, its engines built where they are missing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .options import check_decode, pipeline_options

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.pipeline import Pipeline


def find_engines(arguments: argparse.Namespace) -> Path:
    """The folder of the engines that the options name, built where missing."""
    options = pipeline_options(arguments)
    from qwen2vl_trt.building.folder import engine_folder
    from qwen2vl_trt.building.plan import BuildRequest

    return engine_folder(BuildRequest.from_arguments(arguments), options)


def open_pipeline(arguments: argparse.Namespace) -> Pipeline:
    """A pipeline of the engines that the options name, built where missing."""
    options = pipeline_options(arguments)
    check_decode(arguments.decode, arguments.device)
    from qwen2vl_trt.runtime.pipeline import Pipeline

    return Pipeline.from_engine_dir(find_engines(arguments), arguments.device, options)
