"""Seconds and memory of building both TensorRT-RTX engines of a model of 3B's size, with random weights, no GPU.

    python -m benchmarks.tensorrt_build [--layers 36] [--blocks 32] [--folder DIR] [--json FILE]

It writes 8 GB of random BF16 weights (zeros would be merged into one constant), runs ``build_engines.py`` on them as
a user would, and removes both. The memory is that process's peak, libraries included.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.export import config_of_7b, write_sparse_checkpoint
from benchmarks.measure import heading, machine

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = 1 << 24  # weights drawn at once


def config_of_3b(layers: int, blocks: int) -> dict:
    """``config.json`` of Qwen2.5-VL-3B, with another depth."""
    config = config_of_7b(layers, blocks) | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    full = [block for block in config["vision_config"]["fullatt_block_indexes"] if block < blocks] or [0]
    config["vision_config"] |= {"out_hidden_size": 2048, "fullatt_block_indexes": full}
    return config


def write_random_checkpoint(folder: Path, config: dict) -> int:
    """Write a checkpoint in BF16 with normal random weights; returns their size."""
    size = write_sparse_checkpoint(folder, config)
    (path,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - size)
        for _ in range(math.ceil(size / 2 / _BLOCK)):
            weights = (torch.randn(_BLOCK, generator=generator) * 0.02).to(torch.bfloat16)
            left = path.stat().st_size - file.tell()
            file.write(weights.view(torch.int16).numpy().tobytes()[:left])
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=36, help="of the decoder (default 36)")
    parser.add_argument("--blocks", type=int, default=32, help="of the vision tower (default 32)")
    parser.add_argument("--folder", type=Path, help="on a disk with 15 GB free; default the system's temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    heading(machine("onnx", "tensorrt_rtx_cu13"))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        checkpoint, engines = Path(temporary) / "checkpoint", Path(temporary) / "engines"
        checkpoint.mkdir()
        weights = write_random_checkpoint(checkpoint, config_of_3b(options.layers, options.blocks))
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
    print(f"weights (BF16, random)       {figures['weights_mb']:>10,.0f} MB")
    print(f"export and both builds       {figures['seconds']:>10.1f} s")
    print(f"peak memory                  {figures['peak_mb']:>10,.0f} MB")
    print(f"vision plan                  {figures['vision_plan_mb']:>10,.0f} MB")
    print(f"decoder plan                 {figures['decoder_plan_mb']:>10,.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(vars(options) | figures, default=str, indent=2))


if __name__ == "__main__":
    main()
