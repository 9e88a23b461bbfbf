#!/usr/bin/env python3
"""Build a vision engine and a decoder engine from a Qwen2.5-VL checkpoint."""

from __future__ import annotations

import argparse
import sys

from engines.arguments import add_build_arguments, plan_build
from engines.build import build_engines
from runtime.command import run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="build_engines.py", description=__doc__)
    add_build_arguments(parser)
    parser.add_argument("--force", action="store_true", help="build even if the folder already holds the same engines")
    arguments = parser.parse_args()
    plan = plan_build(arguments)
    built = build_engines(plan.model, plan.backend, plan.precision, plan.profile, plan.folder, arguments.force)
    print(f"{plan.folder}: {'built' if built else 'up to date'}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
