"""Weights rounded here and stored: packed as the format's text has it, and read back as what they were rounded to."""

import pytest
import torch

from qwen2vl_trt.quantized.compressed_tensors import CompressedTensors
from qwen2vl_trt.quantized.linear import e2m1
from qwen2vl_trt.quantized.rounding import nvfp4_global_scale, round_to_nearest, round_to_nvfp4
from qwen2vl_trt.quantized.writer import WeightFormat
from tests.support.quantized import layer_of, pack, pairs, read_layer, settings_of

BITS = {"int4": 4, "int8": 8}


def weights(out=24, channels=256):
    return torch.randn(out, channels, generator=torch.Generator().manual_seed(0)).bfloat16()


def stored(form, weight):
    return form.tensors(weight, torch.bfloat16, weight.abs().max())


def reader_of(form):
    return CompressedTensors.of(settings_of(**form.settings(["lm_head"])))


@pytest.mark.parametrize("numbers", BITS)
@pytest.mark.parametrize("channels", [256, 96, 102], ids=["groups of 128", "groups of 32", "a scale a channel"])
def test_integers(numbers, channels):
    weight, bits, form = weights(channels=channels), BITS[numbers], WeightFormat.of(numbers, {channels})
    assert form.group_size == {256: 128, 96: 32, 102: None}[channels]
    rounded = round_to_nearest(weight, bits, form.group_size or channels, torch.bfloat16)
    tensors = stored(form, weight)
    count = 32 // bits
    unsigned = torch.nn.functional.pad(rounded.values.long() + 2 ** (bits - 1), (0, -channels % count))
    assert torch.equal(tensors["weight_packed"], pack(unsigned, bits))
    assert tensors["weight_shape"].tolist() == [24, channels]
    assert torch.equal(tensors["weight_scale"].float(), rounded.scales)
    assert torch.equal(read_layer(reader_of(form), tensors), rounded.dequantize())
    assert reader_of(form).numbers(layer_of(tensors)) == numbers


def test_nvfp4():
    weight, form = weights(channels=48), WeightFormat.of("nvfp4", {48, 256})
    overall = nvfp4_global_scale(weight.abs().max())
    codes, scales = round_to_nvfp4(weight, overall)
    tensors = stored(form, weight)
    assert torch.equal(tensors["weight_packed"], pairs(codes))
    assert torch.equal(tensors["weight_global_scale"], overall.reshape(1))
    meant = e2m1(codes).float().unflatten(1, (-1, 16)) * (scales.float() / overall)[..., None]
    assert torch.equal(read_layer(reader_of(form), tensors), meant.flatten(1))
    assert reader_of(form).numbers(layer_of(tensors)) == "nvfp4"


@pytest.mark.parametrize("numbers", [*BITS, "nvfp4"])
def test_types_and_shapes_are_known_without_the_weight(numbers):
    weight, form = weights(channels=64), WeightFormat.of(numbers, {64})
    known = form.tensors(torch.empty_like(weight, device="meta"), torch.bfloat16, torch.ones(()))
    entries = {leaf: (tensor.dtype, tensor.shape) for leaf, tensor in known.items()}
    assert entries == {leaf: (tensor.dtype, tensor.shape) for leaf, tensor in stored(form, weight).items()}


def test_one_group_size_for_all_widths():
    assert WeightFormat.of("int4", {2048, 11008}).group_size == 128
    assert WeightFormat.of("int8", {128, 96}).group_size == 32
    assert WeightFormat.of("int4", {112, 201}).group_size is None
    assert WeightFormat.of("nvfp4", {112, 201}).group_size is None
