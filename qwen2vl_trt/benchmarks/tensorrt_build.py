"""Seconds and memory of building both TensorRT-RTX engines of a model of 3B's size, with random weights, no GPU.

    python -m qwen2vl_trt.benchmarks.tensorrt_build [--layers 36] [--blocks 32] [--folder DIR] [--json FILE]

It writes 8 GB of random BF16 weights (zeros would be merged into one constant), runs ``build_engines.py`` on them as
a user would, and removes both. The memory is that process's peak, libraries included.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwen2vl_trt.benchmarks.measure import heading, option_parser, print_figures
from qwen2vl_trt.benchmarks.random_model import config_of, write_random_checkpoint
from qwen2vl_trt.engines.command import folder_name

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = option_parser(__doc__, depth=(36, 32))
    parser.add_argument(
        "--folder", type=folder_name, help="on a disk with 15 GB free; default the system's temporary one"
    )
    options = parser.parse_args()
    heading("onnx", "tensorrt_rtx_cu13")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        checkpoint, engines = Path(temporary) / "checkpoint", Path(temporary) / "engines"
        checkpoint.mkdir()
        weights = write_random_checkpoint(checkpoint, config_of("Qwen2.5-VL-3B", options.layers, options.blocks))
        command = [sys.executable, "build_engines.py", "--backend", "tensorrt-rtx", "--precision", "bf16"]
        began = time.perf_counter()
        subprocess.run([*command, "--model", checkpoint, "--engine-dir", engines], cwd=ROOT, check=True)
        figures = {
            "weights_mb": weights / 1e6,
            "seconds": time.perf_counter() - began,
            "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
            "vision_plan_mb": (engines / "vision.engine").stat().st_size / 1e6,
            "decoder_plan_mb": (engines / "decoder.engine").stat().st_size / 1e6,
        }
    rows = {
        "weights (BF16, random)": f"{figures['weights_mb']:,.0f} MB",
        "export and both builds": f"{figures['seconds']:.1f} s",
        "peak memory": f"{figures['peak_mb']:,.0f} MB",
        "vision plan": f"{figures['vision_plan_mb']:,.0f} MB",
        "decoder plan": f"{figures['decoder_plan_mb']:,.0f} MB",
    }
    print_figures(rows, options, figures)


if __name__ == "__main__":
    main()
