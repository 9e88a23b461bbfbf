#!/usr/bin/env python3
"""Build a vision engine and a decoder engine from a Qwen2.5-VL checkpoint."""

from __future__ import annotations

from qwen2vl_trt.engines.interrupts import begin

if __name__ == "__main__":
    begin()  # before the rest is imported

import argparse
import sys

from qwen2vl_trt.engines.command import Parser, run_command

EXAMPLES = """examples:
  build_engines.py --model tiny
  build_engines.py --model Qwen2.5-VL-7B --backend torch --precision bf16
  build_engines.py --model path/to/checkpoint --max-batch-size 4 --max-hw-dims 2048
  build_engines.py --model Qwen2.5-VL-7B --precision fp8 --calibration-data path/to/images"""


def main() -> None:
    from qwen2vl_trt.engines.arguments import add_build_arguments, plan_build
    from qwen2vl_trt.runtime.engine_folder import build_planned
    from qwen2vl_trt.tiny.calibration import training_data

    parser = Parser(
        prog="build_engines.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_build_arguments(parser)
    plan = plan_build(parser.parse_args())
    if build_planned(plan, training_data):
        state = "built"
    else:
        state = "up to date" + (f", built with {' '.join(plan.kept)}" if plan.kept else "")
    print(f"{plan.folder}: {state}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
