"""What an engine takes and gives, by name; which optimisation profile takes a batch; the GPU memory that it needs."""

from __future__ import annotations

from collections.abc import Mapping
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


ALIGNMENT = 256
"""Bytes; TensorRT asks it of every address."""


def token_bytes(config: TextConfig, dtype: torch.dtype) -> int:
    """Bytes that the key-value cache needs for one token of one request, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def check_cache(config: TextConfig, profile: BuildProfile, dtype: torch.dtype, free: int) -> None:
    """Refuse limits whose key-value cache does not fit, before any of it is allocated.

    Args:
        config: the decoder.
        profile: the engine's limits.
        dtype: of the cache.
        free: bytes of GPU memory that the cache may take.

    Raises:
        EngineError: what is needed for which batch and length, and what would fit.
    """
    batch, length, token = profile.max_batch_size, profile.max_seq_len, token_bytes(config, dtype)
    if batch * length * token <= free:
        return
    fits = []
    if free >= length * token:
        fits.append(f"--max-batch-size {free // (length * token):,} at this length")
    shorter = free // (batch * token)
    shorter -= shorter % ALIGNMENT if shorter > ALIGNMENT else 0  # rows of such a length are aligned, see check_rows
    if shorter > 1:  # a prompt of one token and an answer of one
        prompt = "" if profile.max_input_len < shorter else f" (--max-input-len below {shorter:,})"
        fits.append(f"--max-seq-len {shorter:,}{prompt} at this batch")
    raise EngineError(
        f"the key-value cache needs {format_bytes(batch * length * token)} for --max-batch-size {batch:,} x --max-seq-len"
        f" {length:,}, and {format_bytes(free)} of GPU memory is left for it; what fits:"
        f" {' or '.join(fits) or 'nothing, not one request'}. Rebuild, or free GPU memory."
    )


def check_rows(config: TextConfig, profile: BuildProfile, dtype: torch.dtype) -> None:
    """Refuse a cache whose rows, a request each, do not begin where TensorRT can take an address.

    Raises:
        EngineError: a row of one layer is no multiple of :data:`ALIGNMENT` bytes.
    """
    position = config.num_key_value_heads * config.head_dim * dtype.itemsize
    if profile.max_batch_size > 1 and position * profile.max_seq_len % ALIGNMENT:
        step = next(step for step in (2, 4, 8, 16, 32, 64, 128, 256) if position * step % ALIGNMENT == 0)
        raise EngineError(
            f"--max-seq-len {profile.max_seq_len:,} gives cache rows of {position * profile.max_seq_len:,} bytes;"
            f" TensorRT takes addresses at multiples of {ALIGNMENT}. Rebuild with a multiple of {step}."
        )


def streaming_budget(streamable: int, free: int, needed: int) -> int:
    """Bytes of weights to keep on the GPU: all that fit beside what else the engine needs, the rest is streamed.

    Args:
        streamable: bytes of weights that may stay in host memory.
        free: bytes of GPU memory with none of them there.
        needed: bytes for caches and activations.
    """
    return min(streamable, max(free - needed, 0))


def format_bytes(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
