"""Seconds and memory of exporting both graphs of a model of 7B's size, whose weights are holes in a sparse file.

    python -m qwen2vl_trt.benchmarks.export [--layers 28] [--blocks 32] [--precision fp32] [--json FILE]

Export reads the headers of a checkpoint and a few KiB of each tensor, never a whole one, so a file without content
measures the same as the real 16 GB. The memory is the peak of a fresh process, libraries included.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from qwen2vl_trt.benchmarks.measure import heading, option_parser, print_figures
from qwen2vl_trt.benchmarks.random_model import config_of, write_sparse_checkpoint
from qwen2vl_trt.benchmarks.workers import Worker, peak_bytes
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.precision import BF16, FP32

_PRECISIONS = {precision.name: precision for precision in (FP32, BF16)}


class Exporter:
    """Lives in a fresh process, so that its memory is an export's."""

    def export(self, checkpoint: Path, folder: Path, precision: str) -> dict[str, float]:
        """Export and say what it took; seconds without the imports."""
        from qwen2vl_trt.export.onnx_model import export_onnx

        before = peak_bytes() / 1e6
        began = time.perf_counter()
        files = export_onnx(Checkpoint(checkpoint), folder, _PRECISIONS[precision].vision)
        return {
            "seconds": time.perf_counter() - began,
            "imported_mb": before,
            "peak_mb": peak_bytes() / 1e6,
            "written_kb": sum(file.stat().st_size for file in files) / 1e3,
        }


def measure(layers: int, blocks: int, precision: str) -> dict[str, float]:
    """Export a sparse checkpoint in a fresh process."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, engines = Path(temporary) / "checkpoint", Path(temporary) / "engines"
        checkpoint.mkdir()
        engines.mkdir()
        weights = write_sparse_checkpoint(checkpoint, config_of("Qwen2.5-VL-7B", layers, blocks))
        began = time.perf_counter()
        with Worker("the export", Exporter) as worker:
            figures = worker.call("export", checkpoint, engines, precision)
        return {"weights_mb": weights / 1e6, "process_seconds": time.perf_counter() - began, **figures}


def main() -> None:
    parser = option_parser(__doc__, depth=(28, 32))
    parser.add_argument("--precision", choices=_PRECISIONS, default="fp32", help="of the graphs (default fp32)")
    options = parser.parse_args()
    heading("onnx", "onnxscript")
    figures = measure(options.layers, options.blocks, options.precision)
    rows = {
        "weights (BF16, sparse)": f"{figures['weights_mb']:,.0f} MB",
        "export of both graphs": f"{figures['seconds']:.1f} s",
        "the same with its process": f"{figures['process_seconds']:.1f} s",
        "peak memory": f"{figures['peak_mb']:,.0f} MB",
        "  of it after the imports": f"{figures['imported_mb']:,.0f} MB",
        "written": f"{figures['written_kb']:,.0f} kB",
    }
    print_figures(rows, options, figures)


if __name__ == "__main__":
    main()
