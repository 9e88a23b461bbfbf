"""Measure the tiny model on held-out digits."""

from __future__ import annotations

import argparse

from .model import open_pipeline
from .options import add_build_arguments, add_pipeline_arguments, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--cases", type=whole_number, default=1000, metavar="N", help="a task; default %(default)s")
    parser.add_argument("--seed", type=whole_number, default=0, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_pipeline_arguments(parser, files=False, videos=True)
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the accuracy of each task."""
    from qwen2vl_trt.tiny.evaluation import print_accuracy

    print_accuracy(open_pipeline(arguments), arguments.cases, arguments.seed, arguments.json)
