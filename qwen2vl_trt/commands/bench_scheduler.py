"""What the scheduler itself costs on the host: time of a step without a model, operators of sampling, calls.

Counts are the same on every machine; times are medians of this one, on one thread.
"""

from __future__ import annotations

import argparse
import json

from .options import positive_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument("--steps", type=positive_number, default=300, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--baseline",
        metavar="REVISION",
        help="another revision of this checkout beside it: both turn about, three times, medians",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    import torch

    from qwen2vl_trt.benchmarks.scheduler import measure, measure_beside
    from qwen2vl_trt.machine import machine, one_line

    beside = arguments.baseline is not None
    facts = machine(torch.device("cpu"), "torch", "tokenizers")
    figures, theirs = measure_beside(arguments.baseline, arguments.steps) if beside else (measure(arguments.steps), [])
    before = {each.name: each.value for each in theirs}
    if arguments.json:
        found = {"machine": facts, "figures": [vars(figure) for figure in figures], "baseline": before}
        print(json.dumps(found, indent=1))
        return
    print(one_line(facts))
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        columns = [f"{figure.value:10.4g}", f"{figure.unit:2}"]
        if beside:
            columns.append(f"before {before[figure.name]:10.4g}" if figure.name in before else "")
        print(f"{figure.name:{width}}  {' '.join(columns)}".rstrip())
