"""Time and memory of a build, in a process of its own: as the build command makes it."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from . import build
from .bench import add_random_weights, use_random_weights
from .bench_export import report
from .options import add_build_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_random_weights(parser.add_argument_group("random weights"))
    add_build_arguments(parser, device=False)


def run(arguments: argparse.Namespace) -> None:
    """Build once, into a folder that is removed unless ``--engine-dir`` names one, and print what it took."""
    from qwen2vl_trt.benchmarks.workers import measured_call

    use_random_weights(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.engine_dir = arguments.engine_dir or Path(temporary) / "engines"
        figures = measured_call("the build", build.run, arguments)
        files = [path for path in folder.iterdir() if path.suffix in (".engine", ".onnx")]
        figures |= {f"{path.name}_mb": path.stat().st_size / 1e6 for path in files}
    report(figures, arguments, "onnx", "tensorrt_rtx_cu13")
