"""From a checkpoint to ``vision.onnx`` and ``decoder.onnx``: kilobytes, beside the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.quantization import fp8_layers
from qwen2vl_trt.weights import check_weights

from .blocked_weights import BLOCKED, BlockedLayer, WeightOnly, write_blocked
from .graphs import Graph, decoder_graph, vision_graph
from .trace import trace
from .weights import link_checkpoint, point_to_checkpoint, write_dequantized


def export_onnx(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype,
    max_seq_len: int | None = None,
    on_step: Callable[[str], None] = lambda step: None,
    decoder_dtype: torch.dtype | None = None,
    weight_only: WeightOnly | None = None,
) -> list[Path]:
    """Write both graphs into a folder that then holds the whole model; returns the files that are not the checkpoint's.

    A checkpoint quantised to FP8 becomes graphs with QuantizeLinear and DequantizeLinear around its layers; the weights
    of one in another format are dequantised into a file beside it, or put into one in the layout of the graph.

    Args:
        folder: exists; gets the checkpoint's files (weights hard-linked) and the two graphs.
        dtype: of weights and activations in the graphs, FP8 apart.
        max_seq_len: cache capacity of the decoder; None leaves it dynamic.
        on_step: told the name of each step as it begins (see :data:`STEPS`).
        decoder_dtype: of the decoder graph, where it is another than the vision graph's.
        weight_only: which weights the decoder graph has in 4 or 8 bits; None: none.

    Raises:
        CheckpointError: the weights do not fit the configuration, or are quantised in a way that is not supported.
        OSError: the disk is full, or the folder cannot be written.
    """
    dtypes = (dtype, decoder_dtype or dtype)
    graphs = model_graphs(checkpoint, *dtypes, max_seq_len)
    check_fit(checkpoint, graphs)
    on_step(STEPS[0])
    link_checkpoint(checkpoint, folder)
    linked = Checkpoint(folder)
    blocked: dict[str, BlockedLayer] = {}
    paths = []
    if weight_only is not None:
        blocked = write_blocked(linked, folder, weight_only, dtypes[1])
        graphs = model_graphs(checkpoint, *dtypes, max_seq_len, blocked)
        paths.append(folder / BLOCKED)
    paths += write_dequantized(linked, folder, blocked.keys())
    for graph, graph_dtype, step in zip(graphs, dtypes, STEPS[1:]):
        on_step(step)
        model = trace(graph, graph_dtype)
        point_to_checkpoint(model, graph, linked, folder, blocked if graph.name == "decoder" else {})
        paths.append(folder / f"{graph.name}.onnx")
        ir.save(model, paths[-1])
    return paths


def model_graphs(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    decoder_dtype: torch.dtype,
    max_seq_len: int | None = None,
    blocked: Mapping[str, BlockedLayer] = MappingProxyType({}),
) -> list[Graph]:
    """Both graphs of a checkpoint, with FP8 layers where it has them; raises as :func:`export_onnx`."""
    config, fp8 = checkpoint.config, fp8_layers(checkpoint)
    return [vision_graph(config, dtype, fp8), decoder_graph(config, decoder_dtype, max_seq_len, fp8, blocked)]


STEPS = ("linking weights", "exporting the vision graph", "exporting the decoder graph")


def check_fit(checkpoint: Checkpoint, graphs: list[Graph]) -> None:
    """Check names and shapes of a checkpoint's tensors against the graphs' modules; reads no tensor.

    Raises:
        CheckpointError: tensors missing, left over or misshapen, named.
    """
    with torch.device("meta"):
        check_weights(checkpoint, {graph.prefix: graph.module() for graph in graphs})
