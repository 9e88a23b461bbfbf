"""Build a vision engine and a decoder engine from a Qwen2.5-VL checkpoint."""

from __future__ import annotations

import argparse
import sys

from .options import add_build_arguments

EPILOG = """examples:
  %(prog)s --model tiny
  %(prog)s --model Qwen2.5-VL-7B --backend torch --precision bf16
  %(prog)s --model path/to/checkpoint --max-num-seqs 4 --max-hw-dims 2048
  %(prog)s --model Qwen2.5-VL-7B --precision fp8 --calibration-data path/to/images
  %(prog)s --model Qwen2.5-VL-7B --precision int8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    add_build_arguments(parser, device=False)


def run(arguments: argparse.Namespace) -> None:
    """Build what is missing, and say which folder it is."""
    from qwen2vl_trt.building.folder import build_planned
    from qwen2vl_trt.building.plan import BuildRequest, plan_build

    plan = plan_build(BuildRequest.from_arguments(arguments))
    if build_planned(plan):
        state = "built"
    else:
        state = "up to date" + (f", built with {' '.join(plan.kept)}" if plan.kept else "")
    print(f"{plan.folder}: {state}", file=sys.stderr)
