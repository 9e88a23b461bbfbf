#!/usr/bin/env python3
"""Ask a Qwen2.5-VL about images and videos, extract features, compare, measure and inspect engines: `run.py help`."""

from qwen2vl_trt.engines.interrupts import begin

if __name__ == "__main__":
    begin()  # before the rest is imported

from qwen2vl_trt.commands import main
from qwen2vl_trt.commands.process import run_command

if __name__ == "__main__":
    run_command(main)
