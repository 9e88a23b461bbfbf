"""Records what blocks give, on PyTorch modules and in ONNX Runtime, and brings it into one order.

The order is that of Transformers' processor, in which patches enter its vision tower: item by item, merge groups in
raster order, the patches of a group together. Both vision towers compute in another: by windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.onnx_file import read_onnx
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.windows import WindowLayout, unpad

if TYPE_CHECKING:
    import onnxruntime as ort

_BLOCK = re.compile(r"(?:model\.layers|blocks)\.\d+")
_STEM = "patch_embed"


class Recorder:
    """The outputs of blocks by name, FP32 on the CPU, one for each call since the last :meth:`clear`."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Tensor]] = {}

    def add(self, name: str, output: Tensor) -> None:
        """Keep a copy of an output."""
        self.calls.setdefault(name, []).append(output.detach().to("cpu", torch.float32, copy=True))

    def clear(self) -> None:
        """Forget everything."""
        self.calls.clear()

    @contextmanager
    def listen(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Record what modules return: the first of several outputs."""

        def hook(name: str) -> Any:
            return lambda module, inputs, output: self.add(name, output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def vision_modules(tower: nn.Module) -> dict[str, nn.Module]:
    """The patch embedding and the blocks of a vision tower, ours or Transformers', by the checkpoint's names."""
    return {
        "visual.patch_embed": tower.get_submodule("patch_embed"),
        **{f"visual.blocks.{n}": block for n, block in enumerate(tower.get_submodule("blocks").children())},
    }


def decoder_modules(stack: nn.Module) -> dict[str, nn.Module]:
    """The layers of a decoder, ours or Transformers', by the checkpoint's names."""
    return {f"model.layers.{n}": layer for n, layer in enumerate(stack.get_submodule("layers").children())}


def in_patch_order(states: Tensor, layout: WindowLayout, config: VisionConfig) -> Tensor:
    """States of packed windows, ``[W, S, C]`` or without the empty slots ``[..., P, C]``, as ``[P, C]``.

    Transformers' towers keep the second form: their windows are ours without the empty slots.
    """
    states = states.flatten(0, -2)
    padded = len(states) == layout.sequence_position.numel()
    index = layout.merge_index if padded else unpad(layout, config).merge_index
    return states.unflatten(0, (-1, config.merge_unit))[index].flatten(0, 1)


def pack(patches: Tensor, layout: WindowLayout, config: VisionConfig) -> Tensor:
    """Patches ``[P, D]`` in Transformers' order as windows ``[W, S, D]``, empty slots zero."""
    windows, slots = layout.sequence_position.shape
    packed = patches.new_zeros(windows * slots // config.merge_unit, config.merge_unit, patches.shape[1])
    packed[layout.merge_index] = patches.unflatten(0, (-1, config.merge_unit))
    return packed.view(windows, slots, -1)


def marked_graph(path: Path, blocks: int, prefix: str) -> tuple[bytes, list[str]]:
    """A graph with the output of every block among its own, in FP32; it stays in memory, its weights on the disk.

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
        self._bind(binding)
        return binding

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        """Run, and record the marked outputs."""
        self._bind(binding)  # anew: an earlier run's results are bound in their place, with their shapes
        self._session.run_with_iobinding(binding)
        for name, value in zip(self._marked, binding.get_outputs()):
            self._recorder.add(name, torch.from_numpy(np.asarray(value.numpy())))

    def _bind(self, binding: ort.IOBinding) -> None:
        for name in self._marked:
            binding.bind_output(name, "cpu")
