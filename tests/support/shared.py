"""Graphs, engines and checkpoints are made once a run, by whichever of its processes comes first."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from filelock import FileLock

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.export import onnx_model

_run: list[Path] = []


def share_in(factory: pytest.TempPathFactory) -> None:
    """Set the folder that all workers of pytest-xdist have in common."""
    base = factory.getbasetemp()
    _run[:] = [(base.parent if base.name.startswith("popen-") else base) / "shared"]
    _run[0].mkdir(exist_ok=True)


def shared(name: str, make: Callable[[Path], Any]) -> Path:
    """A folder that ``make`` has filled. Do not write into it.

    Args:
        name: the same for what is the same.
        make: is given a folder that does not exist yet.
    """
    folder = _run[0] / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = _run[0] / "part" / name
            shutil.rmtree(part, ignore_errors=True)  # of a test that was interrupted
            part.parent.mkdir(exist_ok=True)
            make(part)
            part.rename(folder)
    return folder


def key_of(checkpoint: Checkpoint, *others: Any) -> str:
    """A name for what is made from a checkpoint and other things, whose ``repr`` tells them apart."""
    return hashlib.sha256(repr((checkpoint.hash, checkpoint.config, others)).encode()).hexdigest()[:20]


_export, _trace = onnx_model.export_onnx, onnx_model.trace


def export_once(
    checkpoint, folder, dtype, max_seq_len=None, on_step=lambda step: None, decoder_dtype=None, weight_only=None
):
    """In the place of ``export_onnx``, for builds: many have the same graph, and one takes four seconds to trace."""
    if onnx_model.trace is not _trace or weight_only is not None:  # the test has another, or few have this one
        return _export(checkpoint, folder, dtype, max_seq_len, on_step, decoder_dtype, weight_only)
    dtypes = (dtype, decoder_dtype or dtype)
    graphs = onnx_model.model_graphs(checkpoint, *dtypes, max_seq_len)
    onnx_model.check_fit(checkpoint, graphs)
    on_step(onnx_model.STEPS[0])
    onnx_model.link_checkpoint(checkpoint, folder)
    dequantized = onnx_model.write_dequantized(checkpoint, folder)
    files = []
    for graph, graph_dtype, step in zip(graphs, dtypes, onnx_model.STEPS[1:]):
        on_step(step)
        name = f"{graph.name}.onnx"

        def make(where: Path, graph=graph, dtype=graph_dtype, name=name) -> None:
            where.mkdir()
            model = onnx_model.trace(graph, dtype)
            onnx_model.point_to_checkpoint(model, graph, Checkpoint(folder), folder)
            ir.save(model, where / name)

        capacity = max_seq_len if graph.name == "decoder" else None
        made = shared(f"{graph.name}-{key_of(checkpoint, graph_dtype, capacity)}", make)
        files.append(Path(shutil.copyfile(made / name, folder / name)))
    return files + dequantized
