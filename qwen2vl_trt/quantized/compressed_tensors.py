"""compressed-tensors, which LLM Compressor writes. Source: ``compressors`` and ``quantization`` of its release 0.20.

``config_groups`` say which numbers which layers have, and a ``format`` how they are stored:

- ``pack-quantized``: ``weight_packed [out, in * bits / 32]`` holds input channels in an int32, the lowest bits first,
  each with half its range added; ``weight_shape`` is ``[out, in]``. Zero points are packed along ``out``, or int8.
- ``int-quantized``, ``float-quantized``, ``naive-quantized``: ``weight [out, in]``, int8 or E4M3.
- ``nvfp4-pack-quantized``: ``weight_packed [out, in / 2]``, two E2M1 a byte, the lower bits first; a ``weight_scale``
  is an E4M3 of 16 channels, to be divided by ``weight_global_scale``.

``weight_scale`` is ``[1]``, ``[out, 1]``, ``[out, G]``, or one of every block of ``block_structure``; ``(q - z) * s``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.schema import convert

from .linear import Numbers, QuantizedLinear, e2m1, unpack
from .stored import FLOATS, Entry, Layer, Settings

_PACKED, _NVFP4 = "pack-quantized", "nvfp4-pack-quantized"
_INT_SCALES = ("tensor", "channel", "group")
_READABLE = {
    _PACKED: {("int", bits, strategy) for bits in (4, 8) for strategy in _INT_SCALES},
    "int-quantized": {("int", 8, strategy) for strategy in _INT_SCALES},
    "float-quantized": {("float", 8, strategy) for strategy in (*_INT_SCALES, "block")},
    _NVFP4: {("float", 4, "tensor_group")},
}
_READABLE["naive-quantized"] = _READABLE["int-quantized"] | _READABLE["float-quantized"]
"""By format: type and bits of the numbers, and what has a scale."""
_NVFP4_GROUP = 16
_STORED = (torch.int8, torch.float8_e4m3fn)
_DIALECTS = (("model.language_model.", "model."), ("model.visual.", "visual."))

_Side = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class _Weights:
    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: Annotated[int, Meta(ge=-1)] | None = None
    strategy: str | None = None
    block_structure: tuple[_Side, _Side] | None = None
    actorder: Any = None


@dataclass(frozen=True)
class _Group:
    targets: list[str]
    weights: _Weights | None = None
    format: str | None = None


@dataclass(frozen=True)
class _Config:
    config_groups: dict[str, Any]
    format: str = ""
    ignore: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Scheme:
    """How the layers of a group are stored."""

    targets: tuple[str, ...]
    format: str
    strategy: str
    weights: _Weights

    @property
    def group_size(self) -> int:
        """Input channels that share a scale, where groups of them do."""
        return _NVFP4_GROUP if self.format == _NVFP4 else self.weights.group_size or 1

    @classmethod
    def of(cls, raw: Any, overall: str, place: str) -> list[_Scheme]:
        """None of a group whose weights are not quantised."""
        group = convert(raw, _Group, place)
        if group.weights is None:
            return []
        weights, form = group.weights, group.format or overall
        usual = {None: "tensor", -1: "channel"}.get(weights.group_size, "group")
        numbers = (weights.type, weights.num_bits, weights.strategy or usual)
        if numbers not in _READABLE.get(form, ()):
            raise CheckpointError(
                f"{place} is {form or 'of no format'}: {weights.type}, {weights.num_bits} bits, a scale a {numbers[2]};"
                f" {', '.join(_READABLE)} of 4 or 8 bits can be read. Take the unquantised checkpoint"
            )
        if numbers[2] == "group" and not (weights.group_size or 0) > 0:
            raise CheckpointError(f"{place}.weights.group_size is {weights.group_size}; a group needs a positive one")
        return [cls(tuple(group.targets), form, numbers[2], weights)]


@dataclass(frozen=True)
class CompressedTensors:
    """See :class:`qwen2vl_trt.quantized.stored.Format`."""

    method = "compressed-tensors"
    leaves = (
        *("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale"),
    )

    schemes: tuple[_Scheme, ...]
    ignore: tuple[str, ...]

    @classmethod
    def of(cls, settings: Settings) -> CompressedTensors:
        """Raises CheckpointError: a setting that is not read."""
        for name, what, nothing in (("transform_config", "config_groups", {}), ("sparsity_config", "format", "dense")):
            given = settings.raw.get(name)
            if isinstance(given, dict) and given.get(what, nothing) != nothing:
                raise settings.refused(name, "checkpoints without one")
        config = convert(settings.raw, _Config, settings.place)
        schemes = tuple(
            scheme
            for name, group in config.config_groups.items()
            for scheme in _Scheme.of(group, config.format, f"{settings.place}.config_groups.{name}")
        )
        patterns = [*config.ignore, *(target for scheme in schemes for target in scheme.targets)]
        for pattern in patterns:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(f"{settings.place} has the pattern {pattern!r:.60}: {error}") from None
        return cls(schemes, tuple(config.ignore))

    def is_quantized(self, entries: Mapping[str, Entry]) -> bool:
        stored = "weight" in entries and entries["weight"].dtype in _STORED
        return stored or "weight_packed" in entries or "weight_scale" in entries

    def shape(self, layer: Layer) -> tuple[int, int]:
        scheme = self._scheme(layer)
        weights = scheme.weights
        if {"weight", "weight_packed"} <= layer.entries.keys():
            raise CheckpointError(f"{layer.place}: {layer.name} has both weight and weight_packed; remove one of them")
        if scheme.format == _PACKED:
            out, _ = layer.matrix("weight_packed", torch.int32)
            layer.check("weight_shape", (torch.int64, torch.int32), (2,))
            channels = int(layer.load("weight_shape")[1])
            layer.check("weight_packed", (torch.int32,), (out, math.ceil(channels * weights.num_bits / 32)))
        elif scheme.format == _NVFP4:
            out, octets = layer.matrix("weight_packed", torch.uint8)
            channels = 2 * octets
            layer.check("weight_global_scale", (torch.float32,), (1,), ())
        else:
            out, channels = layer.matrix("weight", torch.int8 if weights.type == "int" else torch.float8_e4m3fn)
        scales: list[tuple[int, ...]]
        if scheme.strategy == "block":
            rows, columns = weights.block_structure or (1, 1)
            scales = [(math.ceil(out / rows), math.ceil(channels / columns))]
        elif scheme.strategy == "tensor":
            scales = [(1,), (), (1, 1)]
        elif scheme.strategy == "channel":
            scales = [(out, 1), (out,)]
        else:
            scales = [(out, layer.groups(channels, scheme.group_size))]
        layer.check("weight_scale", (torch.float8_e4m3fn,) if scheme.format == _NVFP4 else FLOATS, *scales)
        if not weights.symmetric:
            if scheme.format == _PACKED and layer.dtype("weight_zero_point") == torch.int32:
                scales = [(math.ceil(out * weights.num_bits / 32), *shape[1:]) for shape in scales if len(shape) == 2]
            layer.check("weight_zero_point", (torch.int8, torch.int32), *scales)
        if "weight_g_idx" in layer.entries or weights.actorder in (True, "group", "dynamic"):
            layer.check("weight_g_idx", (torch.int32, torch.int64), (channels,))
        return out, channels

    def numbers(self, layer: Layer) -> Numbers | None:
        scheme = self._scheme(layer)
        if scheme.format == _NVFP4:
            return "nvfp4"
        if scheme.weights.type != "int":
            return None
        return "int4" if scheme.weights.num_bits == 4 else "int8"

    def read(self, layer: Layer) -> QuantizedLinear:
        scheme = self._scheme(layer)
        weights, scales, zeros, overall = scheme.weights, layer.load("weight_scale"), None, None
        if scheme.format == _PACKED:
            out, channels = layer.load("weight_shape").tolist()
            values = _signed(layer.load("weight_packed"), weights.num_bits)[:, :channels]
        elif scheme.format == _NVFP4:
            values = e2m1(unpack(layer.load("weight_packed"), 4))
            scales, overall = scales.float() / layer.load("weight_global_scale"), 1 / layer.load("weight_global_scale")
        else:
            values = layer.load("weight")
        out, channels = values.shape
        if not weights.symmetric:
            zeros = layer.load("weight_zero_point")
            if zeros.dtype == torch.int32:
                zeros = _signed(zeros.T, weights.num_bits).T[:out]
            zeros = zeros.reshape(-1, scales.shape[-1] if scheme.strategy == "group" else 1)
        size = scheme.group_size if scheme.strategy in ("group", "tensor_group") else channels
        if scheme.strategy in ("tensor", "channel"):
            scales = scales.reshape(-1, 1)
        elif scheme.strategy == "block":
            rows, size = weights.block_structure or (1, 1)
            scales = scales.repeat_interleave(rows, 0)[:out]
        index = layer.group_index("weight_g_idx", scales.shape[1], size)
        return QuantizedLinear(values, scales, zeros, size, index, global_scale=overall)

    def _scheme(self, layer: Layer) -> _Scheme:
        """Of the group that names the layer, or a pattern of it, or its class.

        Raises:
            CheckpointError: no group does, or ``ignore`` names it.
        """
        names = {layer.name}
        for long, short in _DIALECTS:  # LLM Compressor writes the modules' names, and Transformers renames the tensors
            if layer.name.startswith(long):
                names.add(short + layer.name.removeprefix(long))
            elif layer.name.startswith(short):
                names.add(long + layer.name.removeprefix(short))
        kinds: tuple[Callable[[str], bool], ...] = (
            lambda target: target in names,
            lambda target: target.startswith("re:") and any(re.match(target[3:], name) for name in names),
            lambda target: target == "Linear",
        )
        found = [scheme for kind in kinds for scheme in self.schemes if any(map(kind, scheme.targets))]
        if not found or any(kind(pattern) for kind in kinds[:2] for pattern in self.ignore):
            raise CheckpointError(
                f"{layer.place}: {layer.name} is quantised, but by config.json it is not: "
                f"{'no group of config_groups names it' if not found else 'ignore names it'}. Take the unquantised"
                " checkpoint"
            )
        return found[0]


def _signed(words: Tensor, bits: int) -> Tensor:
    """``[n, m]`` int32 to ``[n, m * 32 / bits]`` int8."""
    return (unpack(words, bits).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
