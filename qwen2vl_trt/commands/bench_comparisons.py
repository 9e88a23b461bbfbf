"""A fixed list of cases beside Transformers, with random weights: images, a video, decoding, requests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qwen2vl_trt.benchmarks import plots
from qwen2vl_trt.benchmarks import report as reports
from qwen2vl_trt.benchmarks.comparisons import CPU_DEPTH, SIZES
from qwen2vl_trt.benchmarks.comparisons import run as measure
from qwen2vl_trt.engines.command import path_name, positive_number
from qwen2vl_trt.export.importable_torchvision import require_torchvision
from qwen2vl_trt.plots import check_plot
from qwen2vl_trt.runtime.backends.runners import parse_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where torch sees one")
    parser.add_argument("--models", nargs="+", choices=SIZES, help="by default all on a GPU, the first on a CPU")
    for name, of in (("--layers", "the decoder"), ("--blocks", "the vision tower")):
        help_text = f"of {of}; by default all on a GPU, {CPU_DEPTH} on a CPU"
        parser.add_argument(name, type=positive_number, metavar="N", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=path_name, metavar="FILE.png", help="how many times faster than Transformers")


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    if arguments.plot is not None:
        check_plot(arguments.plot, "--plot", "bench")
    require_torchvision("run.py bench comparisons", "bench")
    device = parse_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = arguments.models or (SIZES if device.type == "cuda" else SIZES[:1])
    names = [f"Qwen2.5-VL-{size}" for size in dict.fromkeys(models)]
    report = measure(names, device, arguments.layers, arguments.blocks, Path("artifacts"))
    if arguments.json:
        print(json.dumps(reports.comparisons_dict(report, arguments.command_line), indent=1))
    else:
        print("\n".join(reports.comparisons_text(report)))
    if arguments.plot is not None:
        plots.save_speedups(report, arguments.plot)
    if report.interrupted:
        raise KeyboardInterrupt
