"""``run.py bench seed``."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qwen2vl_trt.engines.command import Parser, path_name, positive_number
from qwen2vl_trt.export.importable_torchvision import require_torchvision
from qwen2vl_trt.runtime.backends.runners import parse_device

from ..files import check_plot
from ..random_model import SHAPES
from . import report as seed_report
from .run import CPU_DEPTH, run

_FAMILY = "Qwen2.5-VL-"


def main(argv: list[str]) -> None:
    """Measure, and print what was found."""
    sizes = [name.removeprefix(_FAMILY) for name in SHAPES]
    parser = Parser(
        prog="run.py bench seed",
        description="The seed implementation's comparisons on this machine, and what it cannot do; random weights.",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where torch sees one")
    parser.add_argument("--models", nargs="+", choices=sizes, help="by default all on a GPU, the first on a CPU")
    for name, of in (("--layers", "the decoder"), ("--blocks", "the vision tower")):
        help_text = f"of {of}; by default all on a GPU, {CPU_DEPTH} on a CPU"
        parser.add_argument(name, type=positive_number, metavar="N", help=help_text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=path_name, metavar="FILE.png", help="how many times faster than Transformers")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    require_torchvision("run.py bench seed", "bench")
    device = parse_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    models = arguments.models or (sizes if device.type == "cuda" else sizes[:1])
    names = [_FAMILY + size for size in dict.fromkeys(models)]
    report = run(names, str(device), arguments.layers, arguments.blocks, Path("artifacts"))
    if arguments.json:
        print(json.dumps(seed_report.as_dict(report, ["run.py", "bench", "seed", *argv]), indent=1))
    else:
        print("\n".join(seed_report.text(report)))
    if arguments.plot is not None:
        seed_report.save_plot(report, arguments.plot)
    if report.interrupted:
        raise KeyboardInterrupt
