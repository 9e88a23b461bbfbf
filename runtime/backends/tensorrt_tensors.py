"""What an engine takes and gives, by name; and which of its optimisation profiles takes a batch. No GPU is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
import torch

from qwen2vl_trt.engines.onnx_file import read_onnx
from qwen2vl_trt.engines.tensorrt_profiles import Ranges
from qwen2vl_trt.errors import EngineError, LimitError

Shape = tuple[int, ...]

_ONNX_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
}


@dataclass(frozen=True)
class EngineTensor:
    """One input or output.

    Attributes:
        shape: -1 where it is dynamic.
        dtype: of its elements.
        is_input: or an output.
        alias: of an output, the input whose memory it is written to.
        profiles: of an input, the least and the largest shape in each optimisation profile.
    """

    shape: Shape
    dtype: torch.dtype
    is_input: bool
    alias: str | None = None
    profiles: tuple[tuple[Shape, Shape], ...] = ()


Tensors = Mapping[str, EngineTensor]


def expected_tensors(path: Path, profiles: tuple[Ranges, ...]) -> dict[str, EngineTensor]:
    """What an engine must have that was built from an ONNX file for these profiles.

    Outputs called ``new_`` + an input are the caches: written in place.

    Raises:
        EngineError: the file cannot be read, or is corrupt.
    """
    tensors = {}
    with read_onnx(path) as model:
        graph = model.graph
        for values, is_input in ((graph.input, True), (graph.output, False)):
            for value in values:
                dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                bounds = [
                    (
                        tuple(ranges[dim].least if isinstance(dim, str) else dim for dim in dims),
                        tuple(ranges[dim].most if isinstance(dim, str) else dim for dim in dims),
                    )
                    for ranges in (profiles if is_input else ())
                ]
                tensors[value.name] = EngineTensor(
                    tuple(-1 if isinstance(dim, str) else dim for dim in dims),
                    _ONNX_DTYPES[value.type.tensor_type.elem_type],
                    is_input,
                    value.name.removeprefix("new_") if not is_input and value.name.startswith("new_") else None,
                    tuple(bounds),
                )
    return tensors


def check_tensors(found: Tensors, expected: Tensors, name: str) -> None:
    """Refuse an engine that is not of this folder.

    Args:
        found: what the engine has.
        expected: see :func:`expected_tensors`.
        name: of the engine, for the message.

    Raises:
        EngineError: the first difference.
    """
    for tensor in sorted(found.keys() | expected.keys()):
        if tensor not in found or tensor not in expected:
            what = "lacks" if tensor not in found else "has an unknown"
            raise EngineError(f"{name} is not of this folder: it {what} tensor {tensor!r}. Rebuild.")
        for attribute in ("is_input", "dtype", "shape", "alias", "profiles"):
            is_, should = getattr(found[tensor], attribute), getattr(expected[tensor], attribute)
            if is_ != should:
                raise EngineError(
                    f"{name} is not of this folder: {attribute} of tensor {tensor!r} is {is_}, its graph and limits say"
                    f" {should}. Rebuild."
                )


def choose_profile(tensors: Tensors, shapes: Mapping[str, Shape], name: str) -> int:
    """The narrowest profile that takes these input shapes: its kernels were picked for the fewest others.

    Args:
        tensors: the engine's.
        shapes: of every input.
        name: of the engine, for the message.

    Raises:
        LimitError: none takes them; names the input, its size and the limits of the profile that comes nearest.
    """
    inputs = {key: tensor for key, tensor in tensors.items() if tensor.is_input}
    profiles = range(len(next(iter(inputs.values())).profiles))
    outside = {
        profile: [key for key, tensor in inputs.items() if not _within(shapes[key], *tensor.profiles[profile])]
        for profile in profiles
    }
    fitting = [profile for profile in profiles if not outside[profile]]
    if fitting:
        return min(fitting, key=lambda profile: sum(prod(tensor.profiles[profile][1]) for tensor in inputs.values()))
    nearest = min(profiles, key=lambda profile: len(outside[profile]))
    key = outside[nearest][0]
    least, most = (" x ".join(map(str, shape)) for shape in inputs[key].profiles[nearest])
    raise LimitError(
        f"{name} engine: {key} is {' x '.join(map(str, shapes[key]))}; it was built for {least} to {most}. Rebuild with"
        " other limits (inspect shows them)."
    )


def _within(shape: Shape, least: Shape, most: Shape) -> bool:
    return len(shape) == len(least) and all(low <= size <= high for low, size, high in zip(least, shape, most))
