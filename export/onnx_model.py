"""From a checkpoint to ``vision.onnx`` and ``decoder.onnx``: kilobytes, beside the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.weights import check_weights

from .graphs import Graph, decoder_graph, vision_graph
from .trace import trace
from .weights import link_checkpoint, point_to_checkpoint


def export_onnx(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype,
    max_seq_len: int | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> list[Path]:
    """Write both graphs into a folder that then holds the whole model.

    Args:
        checkpoint: the model.
        folder: exists; gets the checkpoint's files (weights hard-linked) and the two graphs.
        dtype: of weights and activations in the graphs.
        max_seq_len: cache capacity of the decoder; None leaves it dynamic.
        on_step: told the name of each step as it begins (see :data:`STEPS`).

    Returns:
        The two files.

    Raises:
        CheckpointError: the weights do not fit the configuration.
        BuildError: the folder cannot be written.
    """
    graphs = [vision_graph(checkpoint.config, dtype), decoder_graph(checkpoint.config, dtype, max_seq_len)]
    check_fit(checkpoint, graphs)
    on_step(STEPS[0])
    link_checkpoint(checkpoint, folder)
    linked = Checkpoint(folder)
    paths = []
    for graph, step in zip(graphs, STEPS[1:]):
        on_step(step)
        model = trace(graph, dtype)
        point_to_checkpoint(model, graph, linked, folder)
        paths.append(folder / f"{graph.name}.onnx")
        try:
            ir.save(model, paths[-1])
        except OSError as error:
            raise BuildError(f"{paths[-1]}: {error.strerror or error}; nothing that loads was left there") from None
    return paths


STEPS = ("linking weights", "exporting the vision graph", "exporting the decoder graph")


def check_fit(checkpoint: Checkpoint, graphs: list[Graph]) -> None:
    """Check names and shapes of a checkpoint's tensors against the graphs' modules; reads no tensor.

    Raises:
        CheckpointError: tensors missing, left over or misshapen, named.
    """
    with torch.device("meta"):
        check_weights(checkpoint, {graph.prefix: graph.module() for graph in graphs})
