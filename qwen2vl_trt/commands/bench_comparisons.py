"""The seed implementation's comparisons on this machine, and what it cannot do; random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qwen2vl_trt.benchmarks.comparisons import report as reports
from qwen2vl_trt.benchmarks.comparisons.run import CPU_DEPTH
from qwen2vl_trt.benchmarks.comparisons.run import run as measure
from qwen2vl_trt.benchmarks.files import check_plot
from qwen2vl_trt.benchmarks.random_model import SHAPES
from qwen2vl_trt.engines.command import path_name, positive_number
from qwen2vl_trt.export.importable_torchvision import require_torchvision
from qwen2vl_trt.runtime.backends.runners import parse_device

_FAMILY = "Qwen2.5-VL-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    sizes = [name.removeprefix(_FAMILY) for name in SHAPES]
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where torch sees one")
    parser.add_argument("--models", nargs="+", choices=sizes, help="by default all on a GPU, the first on a CPU")
    for name, of in (("--layers", "the decoder"), ("--blocks", "the vision tower")):
        help_text = f"of {of}; by default all on a GPU, {CPU_DEPTH} on a CPU"
        parser.add_argument(name, type=positive_number, metavar="N", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=path_name, metavar="FILE.png", help="how many times faster than Transformers")


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    sizes = [name.removeprefix(_FAMILY) for name in SHAPES]
    if arguments.plot is not None:
        check_plot(arguments.plot)
    require_torchvision("run.py bench comparisons", "bench")
    device = parse_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = arguments.models or (sizes if device.type == "cuda" else sizes[:1])
    names = [_FAMILY + size for size in dict.fromkeys(models)]
    report = measure(names, str(device), arguments.layers, arguments.blocks, Path("artifacts"))
    if arguments.json:
        print(json.dumps(reports.as_dict(report, arguments.command_line), indent=1))
    else:
        print("\n".join(reports.text(report)))
    if arguments.plot is not None:
        reports.save_plot(report, arguments.plot)
    if report.interrupted:
        raise KeyboardInterrupt
