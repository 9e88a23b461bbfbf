"""Seconds and memory of exporting both graphs of a model of 7B's size, whose weights are holes in a sparse file.

    python -m benchmarks.export [--layers 28] [--blocks 32] [--precision fp32] [--json FILE]

Export reads the headers of a checkpoint and a few KiB of each tensor, never a whole one, so a file without content
measures the same as the real 16 GB. The memory is the peak of a fresh process, libraries included.
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

from benchmarks.measure import heading, machine
from engines.backends import DTYPES
from qwen2vl_trt.checkpoint import SINGLE_FILE, Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.vision import VisionTransformer


def config_of_7b(layers: int, blocks: int) -> dict:
    """``config.json`` of Qwen2.5-VL-7B, with another depth."""
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {
            "depth": blocks,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
    }


def write_sparse_checkpoint(folder: Path, config: dict) -> int:
    """Write a checkpoint in BF16 that is all zeros and takes no room on the disk; returns the weights' size."""
    (folder / "config.json").write_text(json.dumps(config))
    parsed = Qwen2VLConfig.from_dict(config)
    with torch.device("meta"):
        modules = {"visual.": VisionTransformer(parsed.vision), "": Decoder(parsed.text)}
    header, end = {}, 0
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            begin, end = end, end + 2 * math.prod(tensor.shape)
            header[prefix + name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return end


def export_here(checkpoint: Path, folder: Path, precision: str) -> dict[str, float]:
    """Export in this process and say what it took; seconds without the imports."""
    from export.onnx_model import export_onnx

    before = _peak_mb()
    began = time.perf_counter()
    files = export_onnx(Checkpoint(checkpoint), folder, DTYPES[precision])
    return {
        "seconds": time.perf_counter() - began,
        "imported_mb": before,
        "peak_mb": _peak_mb(),
        "written_kb": sum(file.stat().st_size for file in files) / 1e3,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(layers: int, blocks: int, precision: str) -> dict[str, float]:
    """Export a sparse checkpoint in a fresh process."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, engines = Path(temporary) / "checkpoint", Path(temporary) / "engines"
        checkpoint.mkdir()
        engines.mkdir()
        weights = write_sparse_checkpoint(checkpoint, config_of_7b(layers, blocks))
        command = [
            sys.executable,
            "-m",
            "benchmarks.export",
            "--precision",
            precision,
            "--child",
            str(checkpoint),
            str(engines),
        ]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        return {"weights_mb": weights / 1e6, "process_seconds": time.perf_counter() - began, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28, help="of the decoder (default 28)")
    parser.add_argument("--blocks", type=int, default=32, help="of the vision tower (default 32)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the graphs (default fp32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        checkpoint, folder = options.child
        print(json.dumps(export_here(checkpoint, folder, options.precision)))
        return
    heading(machine("onnx", "onnxscript"))
    figures = measure(options.layers, options.blocks, options.precision)
    print(f"weights (BF16, sparse)       {figures['weights_mb']:>10,.0f} MB")
    print(f"export of both graphs        {figures['seconds']:>10.1f} s")
    print(f"the same with its process    {figures['process_seconds']:>10.1f} s")
    print(f"peak memory                  {figures['peak_mb']:>10,.0f} MB")
    print(f"  of it after the imports    {figures['imported_mb']:>10,.0f} MB")
    print(f"written                      {figures['written_kb']:>10,.0f} kB")
    if options.json:
        options.json.write_text(json.dumps(vars(options) | figures, default=str, indent=2))


if __name__ == "__main__":
    main()
