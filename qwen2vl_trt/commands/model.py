"""From a command's options to a pipeline, its engines built where they are missing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl_trt.engines.arguments import add_build_arguments

if TYPE_CHECKING:
    from qwen2vl_trt.runtime.pipeline import Pipeline


def add_model_arguments(parser: argparse.ArgumentParser, files: bool = True) -> None:
    """Add the options that :func:`open_pipeline` reads; ``files``: the command reads image files."""
    from qwen2vl_trt.runtime.pipeline_arguments import add_decode_argument, add_pipeline_arguments

    add_build_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where the backend can use one")
    add_pipeline_arguments(parser)
    if files:
        add_decode_argument(parser)
    else:
        parser.set_defaults(decode="cpu")


def find_engines(arguments: argparse.Namespace) -> Path:
    """The folder of the engines that the options name, built where missing."""
    from qwen2vl_trt.runtime.engine_folder import engine_folder
    from qwen2vl_trt.runtime.pipeline_arguments import pipeline_options
    from qwen2vl_trt.tiny.evaluation import training_data

    return engine_folder(arguments, training_data, pipeline_options(arguments))


def open_pipeline(arguments: argparse.Namespace) -> Pipeline:
    """A pipeline of the engines that the options name, built where missing."""
    from qwen2vl_trt.runtime.pipeline import Pipeline
    from qwen2vl_trt.runtime.pipeline_arguments import check_decode, pipeline_options

    check_decode(arguments.decode, arguments.device)
    options = pipeline_options(arguments)
    return Pipeline.from_engine_dir(find_engines(arguments), arguments.device, options)
