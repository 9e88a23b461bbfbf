"""Point a graph's weights into the checkpoint's own safetensors files: no second copy of them is written.

An ONNX initialiser may lie in an external file at an offset, and a safetensors file is a header followed by raw
tensors. ONNX Runtime and TensorRT both want that file beside the model and refuse ``..``, and ONNX Runtime refuses
a symbolic link; a hard link serves both (``tests/export/test_weights.py``).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint, header_of, read_header
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.layers import FP8Linear
from qwen2vl_trt.lora import Adapter
from qwen2vl_trt.weights import checkpoint_names

from .blocked_weights import BlockedLayer
from .graphs import Graph

logger = logging.getLogger(__name__)

DEQUANTIZED = "dequantized.safetensors"
"""Beside a checkpoint whose quantised weights no graph computes with: those weights, by the names of plain ones."""


def link_checkpoint(
    checkpoint: Checkpoint, folder: Path, changes: Mapping[str, Callable[[], Tensor]] = MappingProxyType({})
) -> None:
    """Put a checkpoint's files into an empty folder: weights as hard links, copied where that is impossible.

    Args:
        changes: tensors that become others of the same type and shape, by the checkpoint's name. A file that holds one
            is copied and changed in place, a tensor at a time: names, offsets and index stay. (A file of the changed
            tensors alone would leave the old ones beside them, and TensorRT-LLM reads every file of a folder.)

    Raises:
        OSError: the disk is full, or the folder cannot be written or holds a model.
    """
    for source in checkpoint.companions:
        shutil.copyfile(source, folder / source.name)
    for source in sorted(checkpoint.folder.glob("*.safetensors")):
        here = [name for name in changes if checkpoint.locate(name).path == source.resolve()]
        if here:
            shutil.copyfile(source, folder / source.name)
            with (folder / source.name).open("r+b") as file:
                for name in sorted(here, key=lambda name: checkpoint.locate(name).offset):
                    file.seek(checkpoint.locate(name).offset)
                    file.write(changes[name]().flatten().view(torch.uint8).numpy().data)
        elif source.resolve() in checkpoint.weight_files:
            _link_or_copy(source.resolve(), folder / source.name)


@contextmanager
def merged_checkpoint(checkpoint: Checkpoint, adapter: Adapter, folder: Path) -> Iterator[Checkpoint]:
    """The checkpoint with an adapter merged, in a new folder that is removed at the end.

    Raises:
        CheckpointError: they do not fit each other, see :meth:`qwen2vl_trt.lora.Adapter.changes`.
        OSError: the disk is full, or the folder cannot be written.
    """
    changes = adapter.changes(checkpoint)
    folder.mkdir()
    try:
        link_checkpoint(checkpoint, folder, changes)
        yield Checkpoint(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    """The target must not exist: writing through an old hard link would change the checkpoint that it came from."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:  # of many numbers, by file system; what copying does not mend, it runs into itself
        logger.warning("%s is copied: a hard link to %s is not possible (%s)", target, source, error.strerror)
        shutil.copyfile(source, target)


def write_dequantized(checkpoint: Checkpoint, folder: Path, but: Set[str] = frozenset()) -> list[Path]:
    """Write the weights of :attr:`Checkpoint.packed` for the graphs in a folder, one weight in memory at a time.

    Args:
        but: layers that graphs compute with as they are, by our names without ``.weight``.

    Returns:
        The file; none where there is no such weight.

    Raises:
        CheckpointError: numbers in a weight that make no sense.
        OSError: the disk is full, or the folder cannot be written.
    """
    computed = {theirs for ours, theirs in checkpoint_names(checkpoint).items() if ours.removesuffix(".weight") in but}
    packed = {name: weight for name, weight in checkpoint.packed.items() if name not in computed}
    if not packed:
        return []
    (dtype,) = {weight.dtype for weight in packed.values()}
    path = folder / DEQUANTIZED
    with path.open("wb") as file:
        file.write(header_of({name: weight.shape for name, weight in packed.items()}, dtype))
        for name in packed:
            file.write(checkpoint.load(name).view(torch.uint8).numpy().data)
    return [path]


def point_to_checkpoint(
    model: ir.Model,
    graph: Graph,
    checkpoint: Checkpoint,
    folder: Path,
    blocked: Mapping[str, BlockedLayer] = MappingProxyType({}),
) -> None:
    """Make every open initialiser an external tensor in the checkpoint's files, which lie in ``folder`` by name.

    So do the files of :func:`write_dequantized` and of :func:`.blocked_weights.write_blocked`, where there are such.

    Where the stored type differs from the graph's (BF16 weights in an FP32 graph), a Cast follows it. The scales of a
    quantised checkpoint are written into the graph, a number each.

    Raises:
        CheckpointError: a tensor is missing, has another number of elements, or a type that no graph takes.
    """
    names = checkpoint_names(checkpoint)
    dequantized = read_header(folder / DEQUANTIZED) if (folder / DEQUANTIZED).is_file() else {}
    _point_to_blocked(model, blocked)
    _write_scales(model, {value: names.get(graph.prefix + value) for value in model.graph.initializers}, checkpoint)
    shard_names = {path.resolve(): path.name for path in checkpoint.folder.iterdir() if path.suffix == ".safetensors"}
    for value in list(model.graph.initializers.values()):
        if value.const_value is not None:
            continue
        assert value.name is not None
        assert value.shape is not None
        if graph.prefix + value.name not in names:
            raise CheckpointError(f"{checkpoint.folder}: tensor {graph.prefix + value.name!r} is missing")
        theirs = names[graph.prefix + value.name]
        location = dequantized[theirs] if theirs in dequantized else checkpoint.locate(theirs)
        if location.dtype not in _SHORT_NAMES:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {theirs!r} is {location.dtype}; a graph takes"
                f" {', '.join(map(str, _SHORT_NAMES))}"
            )
        shape = [int(dim) for dim in value.shape]  # type: ignore[arg-type]
        stored = ir.DataType.from_short_name(_SHORT_NAMES[location.dtype])
        if stored.itemsize * math.prod(shape) != location.length:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {theirs!r} is {list(location.shape)}, the graph needs {shape}"
            )
        if stored != value.dtype:
            if ir.DataType.FLOAT8E4M3FN in (stored, value.dtype):
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor {theirs!r} is {location.dtype}; only the"
                    " weights of linear layers can be FP8"
                )
            _cast_after(model, value, stored)
        value.const_value = ir.ExternalTensor(
            location=shard_names[location.path],
            offset=location.offset,
            length=location.length,
            dtype=stored,
            shape=ir.Shape(shape),
            name=value.name,
            base_dir=folder,
        )


def _cast_after(model: ir.Model, value: ir.Value, stored: ir.DataType) -> None:
    """Turn an initialiser into one of its stored type, and give its users a Cast to the type they expect.

    A weight that is transposed is cast thereafter: ONNX Runtime, which folds both for all weights, holds the results of
    the first until it is done, and a transposed weight of 16 bits is half as large.
    """
    wanted, users = value.dtype, list(value.uses())
    assert wanted is not None
    value.dtype, last = stored, None
    if len(users) == 1 and users[0].node.op_type == "Transpose":
        last = users[0].node
        value = last.outputs[0]
        value.dtype, users = stored, list(value.uses())
    node = ir.node("Cast", [value], attributes={"to": wanted}, name=f"{value.name}.Cast")
    output = node.outputs[0]
    output.name, output.shape, output.dtype = f"{value.name}.{wanted.name.lower()}", value.shape, wanted
    for use in users:
        use.node.replace_input_with(use.idx, output)
    if last is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(last, node)


def _point_to_blocked(model: ir.Model, layers: Mapping[str, BlockedLayer]) -> None:
    """Give weights of 4 and 8 bits their place; layers of one input come to share what is done to it."""
    shared: dict[tuple[str, str, bytes], ir.Value] = {}
    for layer, stored in layers.items():
        for part, tensor in stored.parts.items():
            value = model.graph.initializers[f"{layer}.{part}"]
            if part in _OF_THE_INPUT:
                same = shared.setdefault((layer.rpartition(".")[0], part, tensor.tobytes()), value)
                if same is not value:
                    value.replace_all_uses_with(same)
                    del model.graph.initializers[f"{layer}.{part}"]
                    continue
            value.const_value, value.dtype = tensor, tensor.dtype
            tensor.name = f"{layer}.{part}"
    if layers:
        passes.CommonSubexpressionEliminationPass()(model)


def _write_scales(model: ir.Model, names: dict[str, str | None], checkpoint: Checkpoint) -> None:
    """Give the scales their values; layers of one input, such as q, k and v, come to share its quantisation."""
    shared: dict[tuple[str, bytes], ir.Value] = {}
    for ours, theirs in names.items():
        layer, _, leaf = ours.rpartition(".")
        if leaf not in FP8Linear.SCALES or theirs is None:
            continue
        value = model.graph.initializers[ours]
        number = checkpoint.load(theirs).float().reshape(()).numpy()
        value.const_value = ir.tensor(number, name=ours)
        if leaf == "input_scale":
            same = shared.setdefault((layer.rpartition(".")[0], number.tobytes()), value)
            if same is not value:
                value.replace_all_uses_with(same)
                del model.graph.initializers[ours]
    if shared:
        passes.CommonSubexpressionEliminationPass()(model)


_OF_THE_INPUT = ("permutation", "input_scale")
_SHORT_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "f8e4m3fn",
}
