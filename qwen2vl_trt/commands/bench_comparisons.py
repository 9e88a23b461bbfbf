"""A fixed list of cases beside Transformers, with random weights: images, a video, decoding, requests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen2vl_trt.errors import require
from qwen2vl_trt.plots import check_plot

from .options import path_name, positive_number

_MODELS = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where torch sees one")
    parser.add_argument("--model", nargs="+", choices=_MODELS, help="by default all on a GPU, the first on a CPU")
    for name, of in (("--layers", "the decoder"), ("--blocks", "the vision tower")):
        help_text = f"of {of}; by default all on a GPU, 4 on a CPU"
        parser.add_argument(name, type=positive_number, metavar="N", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=path_name, metavar="FILE.png", help="how many times faster than Transformers")


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print what was found."""
    if arguments.plot is not None:
        check_plot(arguments.plot, "--plot", "bench")
    require("bench comparisons", "bench", {"torchvision": "torchvision"})
    import torch

    from qwen2vl_trt.benchmarks import plots
    from qwen2vl_trt.benchmarks import report as reports
    from qwen2vl_trt.benchmarks.comparisons import run as measure
    from qwen2vl_trt.runtime.backends.runners import parse_device

    device = parse_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = arguments.model or (_MODELS if device.type == "cuda" else _MODELS[:1])
    report = measure([*dict.fromkeys(models)], device, arguments.layers, arguments.blocks, Path("artifacts"))
    if arguments.json:
        print(json.dumps(reports.comparisons_dict(report, arguments.command_line), indent=1))
    else:
        print("\n".join(reports.comparisons_text(report)))
    if arguments.plot is not None:
        plots.save_speedups(report, arguments.plot)
    if report.interrupted:
        raise KeyboardInterrupt
