"""Print what an engine folder holds: limits, inputs, outputs, precision, profiles, sizes, versions."""

from __future__ import annotations

import argparse

from .options import folder_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("folder", type=folder_name, metavar="DIR")
    parser.add_argument("--layers", action="store_true", help="list every layer that computes, with its type")
    parser.add_argument("--verify", action="store_true", help="read every byte that was built: damage of the disk too")


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from qwen2vl_trt.engines.inspect import inspect_folder
    from qwen2vl_trt.engines.inspect_table import print_report
    from qwen2vl_trt.engines.tables import stdout_console
    from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings

    max_pixels = PreprocessorSettings.from_folder(arguments.folder).image.max_pixels
    report = inspect_folder(arguments.folder, arguments.verify, max_pixels)
    print_report(report, stdout_console(), arguments.layers)
