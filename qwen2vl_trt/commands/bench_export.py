"""Time and memory of exporting both graphs of a model of full size, whose weights are holes in a sparse file.

Export reads the headers of a checkpoint and a few KiB of each tensor, never a whole one, so a file without content
measures the same as the real one. The memory is the peak of a fresh process, libraries included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from qwen2vl_trt.engines.precision import BF16, FP32

from .options import positive_number

_PRECISIONS = {precision.name: precision for precision in (FP32, BF16)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--model", metavar="NAME", default="Qwen2.5-VL-7B", help="whose shape; default %(default)s")
    parser.add_argument("--layers", type=positive_number, metavar="N", help="of the decoder; by default all")
    parser.add_argument("--blocks", type=positive_number, metavar="N", help="of the vision tower; by default all")
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="of the graphs; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Export once, and print what it took."""
    from qwen2vl_trt.benchmarks.random_model import config_of, write_sparse_checkpoint
    from qwen2vl_trt.benchmarks.workers import measured_call

    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, engines = Path(temporary) / "checkpoint", Path(temporary) / "engines"
        checkpoint.mkdir()
        engines.mkdir()
        config = config_of(arguments.model, arguments.layers, arguments.blocks)
        weights = write_sparse_checkpoint(checkpoint, config)
        figures = measured_call("the export", export, checkpoint, engines, arguments.precision)
        written = sum(file.stat().st_size for file in engines.glob("*.onnx")) / 1e6
    report({"weights_mb": weights / 1e6, **figures, "written_mb": written}, arguments, "onnx", "onnxscript")


def export(checkpoint: Path, folder: Path, precision: str) -> None:
    """Write both graphs of a checkpoint."""
    from qwen2vl_trt.checkpoint import Checkpoint
    from qwen2vl_trt.export.onnx_model import export_onnx

    export_onnx(Checkpoint(checkpoint), folder, _PRECISIONS[precision].vision)


def report(figures: dict[str, float], arguments: argparse.Namespace, *packages: str) -> None:
    """Print figures, whose names end in their unit, below the machine and the versions of ``packages``."""
    import torch

    from qwen2vl_trt.machine import machine, one_line

    facts = machine(torch.device("cpu"), *packages)
    if arguments.json:
        print(json.dumps({"command": arguments.command_line, "machine": facts, **figures}, indent=1))
        return
    print(one_line(facts))
    for name, value in figures.items():
        what, _, unit = name.rpartition("_")
        print(f"{what.replace('_', ' '):<28}{value:>13,.1f} {unit.replace('mb', 'MB')}")
