"""Measure engines: throughput, latency, memory, share of each stage, fraction of the roofline."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from qwen2vl_trt.errors import BenchmarkError, require
from qwen2vl_trt.files import check_target, write_json
from qwen2vl_trt.plots import check_plot
from qwen2vl_trt.published import SHAPES

from .model import find_engines
from .options import add_build_arguments, add_decode_argument, check_decode, path_name, positive_number

STAGES = ("processor", "vision", "decoder", "pipeline")
OTHERS = ("comparisons", "scheduler", "build", "export")
"""Commands of two words, dispatched before these options are read."""
PRECISIONS = ("fp32", "bf16", "fp16")
"""Of Transformers."""
EPILOG = """shapes, several of them separated by spaces:
  --shapes 448x448x8 448x448x4,1080x1920             processor, vision: images of a call as HEIGHTxWIDTH[xCOUNT]
  --shapes batch:8,prompt:256,generate:64            decoder: answers together, tokens of each prompt and answer
  --shapes 448x448,batch:4,generate:32               pipeline: requests at a time, each with these images

Latency is of the host's clock on a CPU; on a GPU it is H2D + GPU compute + D2H, from CUDA events."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument(
        "stage",
        nargs="?",
        choices=(*STAGES, *OTHERS),
        help="default vision, decoder, pipeline; the last four are commands with options of their own",
    )
    group = parser.add_argument_group("measuring")
    group.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE", help="what to run; see below")
    group.add_argument(
        "--warm-up", "--warmUp", type=_seconds, default=200.0, metavar="MS", help="default %(default)g ms"
    )
    group.add_argument("--duration", type=_seconds, default=3.0, metavar="S", help="at least; default %(default)g s")
    group.add_argument(
        "--iterations", type=positive_number, default=10, metavar="N", help="at least; default %(default)s"
    )
    group.add_argument(
        "--streams",
        "--infStreams",
        type=positive_number,
        default=1,
        metavar="N",
        help="vision calls at a time; default 1",
    )
    group.add_argument("--use-cuda-graph", "--useCudaGraph", action="store_true", help="replay the vision call (GPU)")
    group.add_argument(
        "--against",
        metavar="transformers[:PRECISION]",
        help="the same work in Transformers, turn about; by default in the engines' precision",
    )
    add_decode_argument(group)
    add_random_weights(group)
    group = parser.add_argument_group("results")
    group.add_argument("--json", action="store_true", help="print JSON instead of a table")
    group.add_argument("--export-times", "--exportTimes", type=path_name, metavar="FILE.json", help="every sample")
    group.add_argument(
        "--export-profile", "--exportProfile", type=path_name, metavar="FILE.json", help="time by operator"
    )
    group.add_argument(
        "--trace", type=path_name, metavar="FILE.json", help="timeline of the last pipeline shape, for ui.perfetto.dev"
    )
    group.add_argument("--trace-plot", type=path_name, metavar="FILE.png", help="the same timeline, as a picture")
    group.add_argument("--plot", type=path_name, metavar="FILE.png", help="latency percentiles")
    add_build_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure engines and print what was found."""
    from qwen2vl_trt.benchmarks import plots
    from qwen2vl_trt.benchmarks import report as reports
    from qwen2vl_trt.benchmarks.bench import run as measure
    from qwen2vl_trt.benchmarks.cases import Shape
    from qwen2vl_trt.benchmarks.engines import EngineOptions
    from qwen2vl_trt.benchmarks.measure import Until

    if arguments.stage in OTHERS:
        raise BenchmarkError(f"bench {arguments.stage} is a command: it comes before the options")
    for path in (arguments.export_times, arguments.export_profile, arguments.trace):
        if path is not None:
            check_target(path)
    for option, path in (("--plot", arguments.plot), ("--trace-plot", arguments.trace_plot)):
        if path is not None:
            check_plot(path, option, "bench")
    stages = (arguments.stage,) if arguments.stage else STAGES[1:]
    tracing = [option for option in ("trace", "trace_plot") if getattr(arguments, option) is not None]
    if tracing and "pipeline" not in stages:
        option = tracing[0].replace("_", "-")
        raise BenchmarkError(f"--{option} is a timeline of the pipeline; bench {arguments.stage} has none")
    shapes = tuple(Shape.parse(text) for text in arguments.shapes)
    check_decode(arguments.decode, arguments.device)
    use_random_weights(arguments)
    folder = find_engines(arguments)
    engines = EngineOptions(folder, arguments.device, arguments.streams, arguments.use_cuda_graph, arguments.decode)
    engines.check(stages)
    until = Until(arguments.warm_up / 1e3, arguments.duration, arguments.iterations)
    against = _baseline(arguments.against, folder)
    report = measure(engines, stages, shapes, until, against, arguments.export_profile is not None, bool(tracing))
    if arguments.json:
        print(json.dumps(reports.as_dict(report, arguments.command_line), indent=1))
    else:
        print("\n".join(reports.text(report)))
    if arguments.export_times is not None:
        write_json(arguments.export_times, reports.times(report))
    if arguments.export_profile is not None:
        write_json(arguments.export_profile, reports.operators(report))
    if arguments.trace is not None and report.trace is not None:
        write_json(arguments.trace, report.trace)
    if arguments.trace_plot is not None and report.trace is not None:
        title = f"{plots.what_ran(report)}: {report.results[-1].case.label}"
        plots.save_timeline(report.trace, title, arguments.trace_plot)
    if arguments.plot is not None:
        plots.save_latencies(report, arguments.plot)
    if report.ended_by is not None:
        sys.stdout.flush()  # an OSError is reported by leaving out what stdout still holds
        raise report.ended_by


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def add_random_weights(group: argparse._ArgumentGroup) -> None:
    """Add the options that :func:`use_random_weights` reads."""
    group.add_argument(
        "--random-weights", action="store_true", help=f"of the shape of --model {', '.join(SHAPES)}, for want of a hub"
    )
    group.add_argument("--layers", type=positive_number, metavar="N", help="of the decoder, with --random-weights")
    group.add_argument("--blocks", type=positive_number, metavar="N", help="of the vision tower, with --random-weights")


def use_random_weights(arguments: argparse.Namespace) -> None:
    """Make ``--model`` the folder of a random checkpoint, where that is asked for; written where it is not there yet.

    Raises:
        BenchmarkError: no such shape, a depth without ``--random-weights``, or too little space on the disk.
    """
    if arguments.random_weights:
        from qwen2vl_trt.benchmarks.random_model import random_checkpoint

        if not arguments.model:
            raise BenchmarkError(f"--random-weights needs a --model to take the shape of: {', '.join(SHAPES)}")
        root = Path("artifacts") / "checkpoints"
        arguments.model = str(random_checkpoint(arguments.model, arguments.layers, arguments.blocks, root))
    elif arguments.layers or arguments.blocks:
        raise BenchmarkError("--layers and --blocks cut a model of --random-weights; a trained one stays whole")


def _baseline(text: str | None, folder: Path) -> str | None:
    """Precision in which Transformers runs; FP8 engines are compared with BF16, which is the nearest it has."""
    if text is None:
        return None
    name, _, precision = text.partition(":")
    if name != "transformers" or (precision and precision not in PRECISIONS):
        raise BenchmarkError(
            f"--against {text}: known is transformers, and with a precision transformers:{{{','.join(PRECISIONS)}}}"
        )
    from qwen2vl_trt.engines.manifest import Manifest

    require("--against transformers", "bench", {"torchvision": "torchvision"})
    built = Manifest.read(folder).precision
    return precision or (built if built in PRECISIONS else "bf16")
