"""Inputs and outputs of a TensorRT engine, choice of the optimisation profile, and GPU memory limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
import torch

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.engines.onnx_file import read_onnx
from qwen2vl_trt.engines.profile import BuildProfile
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
        is_input: not an output.
        alias: of an output, the input that it overwrites.
        profiles: of an input, (min, max) shape in each optimisation profile.
    """

    shape: Shape
    dtype: torch.dtype
    is_input: bool
    alias: str | None = None
    profiles: tuple[tuple[Shape, Shape], ...] = ()


Tensors = Mapping[str, EngineTensor]


def expected_tensors(path: Path, profiles: tuple[Ranges, ...]) -> dict[str, EngineTensor]:
    """Tensors of an engine that was built from an ONNX file for these profiles.

    An output called ``new_`` + an input is a cache, written in place.

    Raises:
        EngineError: the file cannot be read, or is corrupt.
    """
    tensors = {}
    with read_onnx(path) as model:
        graph = model.graph
        for values, is_input in ((graph.input, True), (graph.output, False)):
            for value in values:
                dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                tensors[value.name] = EngineTensor(
                    tuple(-1 if isinstance(dim, str) else dim for dim in dims),
                    _ONNX_DTYPES[value.type.tensor_type.elem_type],
                    is_input,
                    value.name.removeprefix("new_") if not is_input and value.name.startswith("new_") else None,
                    tuple((_shape(dims, ranges, 0), _shape(dims, ranges, 2)) for ranges in profiles if is_input),
                )
    return tensors


def _shape(dims: Sequence[str | int], ranges: Ranges, bound: int) -> Shape:
    """With the named dimensions at their minimum (0), optimum (1) or maximum (2)."""
    return tuple(ranges[dim][bound] if isinstance(dim, str) else dim for dim in dims)


def check_tensors(found: Tensors, expected: Tensors, name: str) -> None:
    """Raises EngineError at the first difference from :func:`expected_tensors`; ``name`` is the engine's."""
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
    """Index of the optimisation profile that takes these input shapes; the smallest if several do.

    Raises:
        LimitError: none does; names the input, its shape and the closest profile's limits.
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
    low, high = (" x ".join(map(str, shape)) for shape in inputs[key].profiles[nearest])
    raise LimitError(
        f"{name} engine: {key} is {' x '.join(map(str, shapes[key]))}; it was built for {low} to {high}. Rebuild with"
        " other limits (inspect shows them)."
    )


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high))


ALIGNMENT = 256
"""Of every address that TensorRT takes, in bytes."""


def token_bytes(config: TextConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in the key-value cache, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def check_cache(config: TextConfig, profile: BuildProfile, dtype: torch.dtype, free: int) -> None:
    """Raises EngineError, which says what would fit, if the key-value cache exceeds ``free`` bytes of GPU memory."""
    batch, length, token = profile.max_num_seqs, profile.max_seq_len, token_bytes(config, dtype)
    if batch * length * token <= free:
        return
    fits = []
    if free >= length * token:
        fits.append(f"--max-num-seqs {free // (length * token):,} at this length")
    shorter = free // (batch * token)
    shorter -= shorter % ALIGNMENT if shorter > ALIGNMENT else 0  # aligned rows, see check_rows
    if shorter > 1:  # a prompt of one token and an answer of one
        prompt = "" if profile.max_input_len < shorter else f" (--max-input-len below {shorter:,})"
        fits.append(f"--max-seq-len {shorter:,}{prompt} for as many requests")
    raise EngineError(
        f"the key-value cache needs {format_bytes(batch * length * token)} for --max-num-seqs {batch:,} x"
        f" --max-seq-len {length:,}, and {format_bytes(free)} of GPU memory is left for it; what fits:"
        f" {' or '.join(fits) or 'nothing, not one request'}. Rebuild, or free GPU memory."
    )


def check_rows(config: TextConfig, profile: BuildProfile, dtype: torch.dtype) -> None:
    """Raises EngineError unless every slot of the key-value cache begins at an aligned address."""
    position = config.num_key_value_heads * config.head_dim * dtype.itemsize
    if profile.max_num_seqs > 1 and position * profile.max_seq_len % ALIGNMENT:
        step = next(step for step in (2, 4, 8, 16, 32, 64, 128, 256) if position * step % ALIGNMENT == 0)
        raise EngineError(
            f"--max-seq-len {profile.max_seq_len:,} gives cache rows of {position * profile.max_seq_len:,} bytes;"
            f" TensorRT takes addresses at multiples of {ALIGNMENT}. Rebuild with a multiple of {step}."
        )


def streaming_budget(streamable: int, free: int, needed: int) -> int:
    """Bytes of weights to keep on the GPU; the rest is streamed.

    ``streamable`` are all weights' bytes, ``free`` the GPU's without any of them, ``needed`` those for other things.
    """
    return min(streamable, max(free - needed, 0))


def format_bytes(count: int) -> str:
    """``1.50 GB`` or ``20.0 MB``."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
