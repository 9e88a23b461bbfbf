#!/usr/bin/env python3
"""Build a vision engine and a decoder engine from a Qwen2.5-VL checkpoint: `build_engines.py --help`."""

from qwen2vl_trt.engines.interrupts import begin

if __name__ == "__main__":
    begin()  # before the rest is imported

from qwen2vl_trt.commands import build_main as main
from qwen2vl_trt.commands.process import run_command

if __name__ == "__main__":
    run_command(main)
