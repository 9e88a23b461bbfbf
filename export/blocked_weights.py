"""The weights of 4 and 8 bits that a decoder graph computes with: a file of their own, in the layout of the graph."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.layers import BlockedLinear
from qwen2vl_trt.quantized.blocks import blocked
from qwen2vl_trt.quantized.linear import Numbers, QuantizedLinear, e2m1_codes, pack
from qwen2vl_trt.quantized.rounding import round_to_nearest
from qwen2vl_trt.weights import EMBEDDING, LM_HEAD, checkpoint_names

logger = logging.getLogger(__name__)

BLOCKED = "decoder.onnx.data"
"""Beside the decoder's graph."""
HEAD_BLOCK = 128
"""Input channels that share a scale of an ``lm_head`` in 8 bits."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class WeightOnly:
    """Which weights a decoder graph has in 4 or 8 bits.

    Attributes:
        numbers: of the checkpoint's layers that it computes with.
        head: an unquantised ``lm_head`` in 8 bits, rounded to nearest.
        tensorrt: NVFP4 as it is, and 8 bits with a scale a channel where the checkpoint has no more, which TensorRT for
            RTX 1.7.1 fuses with the product, as it does INT4. NVFP4, and 8 bits in blocks, a kernel of their own makes
            BF16 in every call: they save memory alone. Else NVFP4 as integers of 8 bits, which are the same numbers,
            and blocks throughout, which ONNX Runtime fuses.
    """

    numbers: Numbers
    head: bool
    tensorrt: bool


@dataclass(frozen=True)
class BlockedLayer:
    """A layer of :class:`qwen2vl_trt.layers.BlockedLinear`: where the values of its parameters lie."""

    block_size: int
    parts: Mapping[str, ir.ExternalTensor]


def write_blocked(
    checkpoint: Checkpoint, folder: Path, chosen: WeightOnly, dtype: torch.dtype
) -> dict[str, BlockedLayer]:
    """Write the file, a layer at a time; returns the layers by our names, without ``.weight``.

    Args:
        dtype: of the graph, and so of scales.

    Raises:
        CheckpointError: numbers in a weight that make no sense.
        OSError: the disk is full, or the folder cannot be written.
    """
    names, layers, others = checkpoint_names(checkpoint), {}, 0
    with (folder / BLOCKED).open("wb") as file:
        writer = BlockedFile(file, folder, dtype)
        for ours, theirs in names.items():
            if theirs not in checkpoint.packed or ours.startswith("visual.") or ours == EMBEDDING:
                continue
            weight = checkpoint.packed[theirs]
            layer = None
            if weight.numbers == chosen.numbers:
                layer = writer.layer(weight.read(), 4 if chosen.numbers == "int4" else 8, chosen.tensorrt)
            if layer is None:
                others += 1
            else:
                layers[ours.removesuffix(".weight")] = layer
        head = LM_HEAD.removesuffix(".weight")
        if chosen.head and head not in layers and checkpoint.entry(names[LM_HEAD]).shape[1] % HEAD_BLOCK == 0:
            rounded = writer.layer(round_to_nearest(checkpoint.load(names[LM_HEAD]), 8, HEAD_BLOCK), 8, chosen.tensorrt)
            assert rounded is not None  # blocks of 128
            layers[head] = rounded
    if others:
        logger.warning(
            "%s: %d layers of the decoder are dequantised, not computed in %s: their numbers are others, or their"
            " groups no power of two from 16 on",
            checkpoint.folder,
            others,
            chosen.numbers,
        )
    return layers


def use_blocked(module: nn.Module, layers: Mapping[str, BlockedLayer]) -> nn.Module:
    """Replace the linear layers of a decoder that are in the file; the module is changed in place and returned."""
    for name, layer in layers.items():
        owner, _, leaf = name.rpartition(".")
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(module.get_submodule(owner), leaf, BlockedLinear(linear, layer.block_size, layer.parts))
    return module


class BlockedFile:
    """Writes layers, one after another.

    Args:
        file: opened for writing, in ``folder``, by the name of :data:`BLOCKED`.
        dtype: of the graph, and so of scales: TensorRT takes no others.
    """

    def __init__(self, file: BinaryIO, folder: Path, dtype: torch.dtype) -> None:
        self._file, self._folder, self._dtype = file, folder, dtype

    def layer(self, weight: QuantizedLinear, bits: int, tensorrt: bool) -> BlockedLayer | None:
        """Write a quantised weight; None where :func:`.blocked` makes no blocks of it.

        Args:
            bits: of integers.
            tensorrt: see :class:`WeightOnly`.
        """
        found = blocked(weight, bits)
        if found is None:
            return None
        parts, offsets = {}, found.offsets
        block_size = found.block_size
        if tensorrt and weight.global_scale is not None:
            codes = e2m1_codes(weight.values).T
            parts["weight"] = self._write(pack(codes.reshape(1, -1), 4), ir.DataType.FLOAT4E2M1, codes.shape)
            scales = (weight.scales / weight.global_scale).nan_to_num().to(torch.float8_e4m3fn).T
            parts["block_scales"] = self._write(scales, ir.DataType.FLOAT8E4M3FN)
            parts["global_scale"] = self._write(weight.global_scale.float().reshape(()), ir.DataType.FLOAT)
        else:
            values = found.values.T
            if found.bits == 4:
                numbers = (values.view(torch.uint8) & 15).reshape(1, -1)
                parts["weight"] = self._write(pack(numbers, 4), ir.DataType.INT4, values.shape)
            else:
                parts["weight"] = self._write(values, ir.DataType.INT8)
            scales = found.scales.T
            if tensorrt and bits == 8 and weight.scales.shape[1] == 1:
                block_size, scales = 0, scales[0]
                offsets = None if offsets is None else offsets[:, :1]
            parts["scales"] = self._write_float(scales)
        if offsets is not None:
            parts["offsets"] = self._write_float(offsets.T)
        if found.permutation is not None:
            parts["permutation"] = self._write(found.permutation, ir.DataType.INT64)
        if found.input_scale is not None:
            parts["input_scale"] = self._write_float(found.input_scale)
        return BlockedLayer(block_size, parts)

    def _write_float(self, tensor: Tensor) -> ir.ExternalTensor:
        return self._write(tensor.to(self._dtype), ir.DataType.from_short_name(_SHORT[self._dtype]))

    def _write(self, tensor: Tensor, dtype: ir.DataType, shape: tuple[int, ...] | None = None) -> ir.ExternalTensor:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        length = self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return ir.ExternalTensor(
            location=BLOCKED,
            offset=offset,
            length=length,
            dtype=dtype,
            shape=ir.Shape(tensor.shape if shape is None else shape),
            name="",
            base_dir=self._folder,
        )


_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
