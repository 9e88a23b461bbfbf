"""What an engine folder holds, for people: limits, inputs, outputs, precision by layer, sizes, versions."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import onnx

from qwen2vl_trt.config import Qwen2VLConfig, VisionConfig

from .backends import BACKENDS
from .manifest import Manifest
from .onnx_file import read_onnx
from .profile import BuildProfile
from .tensorrt_profiles import Ranges, decoder_ranges, vision_ranges

_COMPUTES = ("MatMul", "Gemm", "Attention", "RMSNormalization", "RotaryEmbedding")


@dataclass(frozen=True)
class TensorReport:
    """An input or an output: a dimension is a number or a name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class GraphReport:
    """One of the two graphs.

    Attributes:
        layers: those that compute, in order: name, operator, type.
        profiles: by name, the ranges of the dynamic dimensions; empty where the backend takes any.
    """

    name: str
    inputs: tuple[TensorReport, ...]
    outputs: tuple[TensorReport, ...]
    layers: tuple[tuple[str, str, str], ...]
    profiles: dict[str, Ranges]


@dataclass(frozen=True)
class FileReport:
    """A file of the folder, and whether its bytes are shared with another folder by a hard link."""

    name: str
    bytes: int
    linked: bool


@dataclass(frozen=True)
class FolderReport:
    """Everything that ``inspect`` prints."""

    manifest: Manifest
    limits: tuple[tuple[str, str], ...]
    graphs: tuple[GraphReport, ...]
    files: tuple[FileReport, ...]
    verified: bool


def inspect_folder(folder: Path, verify: bool = False, max_pixels: int | None = None) -> FolderReport:
    """Read an engine folder; loads no engine and needs neither its backend nor a GPU.

    Types are read from the graphs: a strongly typed TensorRT engine and ONNX Runtime compute in them.

    Args:
        verify: read every byte that the build made and compare it with the manifest.
        max_pixels: of an image, by the checkpoint's own settings; None where they set no limit.

    Raises:
        EngineError: no engine, or damaged.
    """
    manifest = Manifest.read(folder)
    config = manifest.verify(folder, verify).config
    plans = manifest.backend in BACKENDS and BACKENDS[manifest.backend].plans
    graphs = []
    for name in ("vision", "decoder"):
        if f"{name}.onnx" in manifest.files:
            profiles = _profiles(name, manifest.profile, config) if plans else {}
            graphs.append(_graph(folder / f"{name}.onnx", name, profiles))
    weights = {path.name for path in folder.glob("*.safetensors")}
    files = []
    for file in sorted({*manifest.files, *weights}):
        stat = (folder / file).stat()
        files.append(FileReport(file, stat.st_size, stat.st_nlink > 1))
    limits = limits_in_words(manifest.profile, config, max_pixels)
    return FolderReport(manifest, limits, tuple(graphs), tuple(files), verify)


def limits_in_words(
    profile: BuildProfile, config: Qwen2VLConfig, max_pixels: int | None = None
) -> tuple[tuple[str, str], ...]:
    """The limits as a user meets them: pixels, images, tokens."""
    patch, unit = config.vision.patch_size, config.vision.merge_unit
    small, large = (isqrt(dims) * patch for dims in (profile.min_hw_dims, profile.max_hw_dims))
    sizes = ((ratio, largest_size(profile, config.vision, ratio, max_pixels)) for ratio in ((4, 3), (16, 9)))
    unshrunk = ", ".join(f"{width} x {height} ({ratio[0]}:{ratio[1]})" for ratio, (width, height) in sizes)
    return (
        ("smallest image", f"{profile.min_hw_dims:,} patches, about {small} x {small} pixels"),
        ("largest image", f"{profile.max_hw_dims:,} patches, about {large} x {large} pixels"),
        ("largest photo unshrunk", unshrunk),
        ("tokens of the largest image", f"{profile.max_hw_dims // unit:,}"),
        ("images or frames a vision call", f"{profile.max_batch_size:,}"),
        ("requests decoding together", f"{profile.max_num_seqs:,}"),
        ("prompt", f"{profile.max_input_len:,} tokens, images included"),
        ("prompt and answer", f"{profile.max_seq_len:,} tokens"),
    )


def largest_size(
    profile: BuildProfile, config: VisionConfig, ratio: tuple[int, int], max_pixels: int | None = None
) -> tuple[int, int]:
    """Width and height in pixels of the largest image of about this ratio that is taken as it is."""
    groups = profile.max_hw_dims // config.merge_unit
    if max_pixels is not None:
        groups = max(1, min(groups, max_pixels // config.image_factor**2))
    rows = max(1, isqrt(groups * ratio[1] // ratio[0]))
    columns = min(groups // rows, round(rows * ratio[0] / ratio[1]))
    return columns * config.image_factor, rows * config.image_factor


def _profiles(name: str, profile: BuildProfile, config: Qwen2VLConfig) -> dict[str, Ranges]:
    if name == "vision":
        return {"vision": vision_ranges(profile, config.vision)}
    return dict(zip(("context", "generation"), decoder_ranges(profile)))


def _graph(path: Path, name: str, profiles: dict[str, Ranges]) -> GraphReport:
    with read_onnx(path) as model:
        graph = model.graph
        types = {
            value.name: _type(value.type.tensor_type.elem_type)
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        dequantised = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        stored = {value.name: _type(value.data_type) for value in graph.initializer}

        def computes_in(node: onnx.NodeProto) -> str:
            if node.input[0] in dequantised:
                return "FP8"
            weights = stored.get(dequantised.get(node.input[1], ""))
            return types.get(node.output[0], "?") + (f", {weights} weights" if weights else "")

        return GraphReport(
            name,
            tuple(map(_tensor, graph.input)),
            tuple(map(_tensor, graph.output)),
            tuple((node.name, node.op_type, computes_in(node)) for node in graph.node if node.op_type in _COMPUTES),
            profiles,
        )


def _tensor(value: onnx.ValueInfoProto) -> TensorReport:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorReport(value.name, shape, _type(tensor.elem_type))


def _type(number: int) -> str:
    return {"FLOAT": "FP32", "BFLOAT16": "BF16", "FLOAT16": "FP16", "FLOAT4E2M1": "FP4"}.get(
        name := onnx.TensorProto.DataType.Name(number), name
    )
