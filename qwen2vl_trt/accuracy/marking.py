"""Marks every block's output in an exported graph and records them all in ONNX Runtime.

The marked graph never touches the disk: ONNX Runtime takes it from memory and the weights from the engine folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from qwen2vl_trt.engines.onnx_file import read_onnx
from qwen2vl_trt.errors import EngineError

from .recorder import Recorder

_BLOCK = re.compile(r"(?:model\.layers|blocks)\.\d+")
_STEM = "patch_embed"


def marked_graph(path: Path, blocks: int, prefix: str) -> tuple[bytes, list[str]]:
    """A graph with the output of every block among its own, in FP32.

    Nodes are named after the modules that made them (:func:`qwen2vl_trt.export.trace.trace`), so a block's output is
    that of the last node that stands in the block itself and in none of its parts: the second residual sum.

    Args:
        path: ``vision.onnx`` or ``decoder.onnx``.
        blocks: how many it must have.
        prefix: of the graph's names in the checkpoint.

    Returns:
        The serialised model, weights left where they are, and the marked outputs' names, those of the checkpoint.

    Raises:
        EngineError: another number of blocks, or a corrupt file.
    """
    with read_onnx(path) as model:
        last: dict[str, str] = {}
        for node in model.graph.node:
            scope = node.name.rpartition(".")[0]
            if _BLOCK.fullmatch(scope):
                last[scope] = node.output[0]
            elif scope.startswith(_STEM) and node.op_type != "Cast":
                last[_STEM] = node.output[0]
        found = [scope for scope in last if scope != _STEM]
        if len(found) != blocks:
            raise EngineError(
                f"{path}: blocks cannot be told apart by its nodes' names; found {len(found)} of {blocks}"
            )
        for scope, value in last.items():
            name = prefix + scope
            model.graph.node.append(onnx.helper.make_node("Cast", [value], [name], to=onnx.TensorProto.FLOAT))
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        return model.SerializeToString(), [prefix + scope for scope in last]


class RecordingSession:
    """An ONNX Runtime session of a marked graph for one of the runtime's runners, which binds its outputs by name."""

    def __init__(self, session: ort.InferenceSession, marked: list[str], recorder: Recorder) -> None:
        self._session, self._marked, self._recorder = session, marked, recorder

    def get_outputs(self) -> list[Any]:
        """As ``ort.InferenceSession.get_outputs``."""
        return self._session.get_outputs()

    def io_binding(self) -> ort.IOBinding:
        """A binding whose first outputs are the marked ones."""
        binding = self._session.io_binding()
        for name in self._marked:
            binding.bind_output(name, "cpu")
        return binding

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        """Run, and record the marked outputs."""
        self._session.run_with_iobinding(binding)
        for name, value in zip(self._marked, binding.get_outputs()):
            self._recorder.add(name, torch.from_numpy(np.asarray(value.numpy())))
