"""Layers over weights of 4 and 8 bits against products in FP64, on both sides of the rows at which they change."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen2vl_trt.quantized.blocks import BlockedWeight
from qwen2vl_trt.runtime.backends import weight_only
from qwen2vl_trt.runtime.backends.weight_only import (
    CudaInt4Linear,
    DequantizedLinear,
    Int4Linear,
    Int8Linear,
    WeightOnlyLinear,
)
from tests.support.bounds import BF16_STEP

OUT, IN = 320, 256  # a whole tile of outputs, and a part of one
DTYPES = (torch.float32, torch.bfloat16)
KINDS = {
    "int4": (4, 64, Int4Linear, 2 * BF16_STEP),  # input, scale, weight and result are rounded to BF16
    "int8 by channel": (8, IN, Int8Linear, 0),
    "int8 in blocks": (8, 128, Int8Linear, 0),
    "int8 in small blocks": (8, 32, DequantizedLinear, 0),
    "nvfp4": (8, 16, DequantizedLinear, 0),
}


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    """What runs here is asked once a process."""
    for each in (weight_only.int4_layout, weight_only.int4_rows, weight_only.has_int8):
        each.cache_clear()
    yield
    monkeypatch.undo()
    for each in (weight_only.int4_layout, weight_only.int4_rows, weight_only.has_int8):
        each.cache_clear()


def weight(bits, block, zeros=False, order=False, smoothing=False, out=OUT):
    draw = torch.Generator().manual_seed(0)
    most = 2 ** (bits - 1)
    values = torch.randint(-most, most, (out, IN), generator=draw, dtype=torch.int8)
    scales = (torch.rand(out, IN // block, generator=draw) + 0.5) / most
    return BlockedWeight(
        values,
        bits,
        scales,
        scales * torch.randint(-most, most, scales.shape, generator=draw) if zeros else None,
        block,
        torch.randperm(IN, generator=draw) if order else None,
        torch.rand(IN, generator=draw) + 0.5 if smoothing else None,
    )


def product(x, weight):
    """FP64, and the sums of the products' magnitudes, of which an error is a part."""
    x = x.double()
    if weight.permutation is not None:
        x = x[:, weight.permutation]
    if weight.input_scale is not None:
        x = x * weight.input_scale.double()
    scaled = weight.values.double() * weight.scales.double().repeat_interleave(weight.block_size, 1)
    offsets = torch.zeros_like(scaled)
    if weight.offsets is not None:
        offsets = weight.offsets.double().repeat_interleave(weight.block_size, 1)
    split = x.abs().amax(1, keepdim=True) / 8126 * scaled.abs().sum(1)
    return x @ (scaled + offsets).T, x.abs() @ (scaled.abs() + offsets.abs()).T, split


def inputs(rows, dtype):
    """A channel is a hundred times as large as the others, as in decoders."""
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[:, 7] *= 100
    return x


def check(layer, weight, x, rounding):
    found = layer(x[None])[0].double()
    expected, magnitudes, split = product(x, weight)
    if x.dtype == torch.bfloat16:
        rounding += 2 * BF16_STEP  # smoothed input, weight, result before and after what is added to it
    bound = (rounding + 1e-6) * magnitudes
    if isinstance(layer.product, Int8Linear):
        bound = bound + split
    assert ((found - expected).abs() <= bound).all()
    assert found.dtype == torch.float64
    assert layer(x).dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"zeros": True, "order": True, "smoothing": True}])
@torch.no_grad()
def test_products(kind, dtype, options, monkeypatch):
    bits, block, product, rounding = KINDS[kind]
    monkeypatch.setattr(weight_only, "int4_rows", lambda: 4)
    monkeypatch.setattr(weight_only, "_ROWS", 8)
    form = weight(bits, block, **options)
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer, biased = (WeightOnlyLinear(form, each, dtype) for each in (None, bias))
    assert type(layer.product) is product
    for rows in (1, 4, 5, 8, 9, 40):
        x = inputs(rows, dtype)
        check(layer, form, x, rounding)
        assert torch.equal(biased(x), layer(x) + bias)


@pytest.mark.parametrize("rows", [0, 4, 5])
@torch.no_grad()
def test_rows_choose_how_four_bits_are_multiplied(rows, monkeypatch):
    layer, called = Int4Linear(weight(4, 64)), []
    monkeypatch.setattr(weight_only, "int4_rows", lambda: 4)
    for way in ("packed_product", "dequantized_product"):
        monkeypatch.setattr(Int4Linear, way, lambda self, x, way=way: called.append(way))
    layer(inputs(rows, torch.float32))
    assert called == ["packed_product" if rows <= 4 else "dequantized_product"]


def test_rows_follow_from_what_both_take(monkeypatch):
    taken = iter((0.001, 0.006))
    monkeypatch.setattr(weight_only, "shortest_seconds", lambda run: next(taken))
    assert weight_only.int4_rows() == 8 * 6


@pytest.mark.parametrize("operator", ["_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"])
@torch.no_grad()
def test_without_the_product_of_four_bits(operator, monkeypatch):
    def raises(*arguments):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.ops.aten, operator, raises)
    form = weight(4, 64, zeros=True)
    layer = WeightOnlyLinear(form, None, torch.float32)
    assert type(layer.product) is DequantizedLinear
    check(layer, form, inputs(3, torch.float32), 0)


@torch.no_grad()
def test_products_that_are_wrong_are_left_out(monkeypatch, caplog):
    """As where sums of bytes saturate."""
    linear = torch.ops.onednn.qlinear_pointwise

    def saturating(*arguments):
        return linear(*arguments).clamp(-(2**15), 2**15)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", saturating)
    form = weight(8, IN)
    layer = WeightOnlyLinear(form, None, torch.float32)
    assert type(layer.product) is DequantizedLinear
    assert "products of bytes are wrong here" in caplog.text
    check(layer, form, inputs(3, torch.float32), 0)


@torch.no_grad()
def test_widths_that_no_product_takes():
    form = weight(4, 64, out=OUT + 8)
    layer = WeightOnlyLinear(form, None, torch.float32)
    assert type(layer.product) is DequantizedLinear
    check(layer, form, inputs(3, torch.float32), 0)


@torch.no_grad()
def test_activations_in_two_bytes():
    x = inputs(5, torch.float32)
    x[0] = 0
    numbers, unit = weight_only.split(x)
    assert numbers.max() <= 127, "pairs of products must not reach 2**15"
    high, low = (numbers.double() - 64).chunk(2)
    assert ((64 * high + low) * unit - x).abs().le(x.abs().amax(1, keepdim=True) / 8126 * (1 + 1e-4)).all()
    x[1, 3] = torch.nan
    layer = WeightOnlyLinear(weight(8, IN), None, torch.float32)
    y = layer(x)
    assert y[1].isnan().all(), "what is no number is not hidden"
    assert not y[0].any()
    assert y[2:].isfinite().all()


def test_a_gpu_is_given_what_its_operators_take():
    """Types and shapes, which PyTorch checks on tensors without data. Has not run on a GPU."""
    assert weight_only.has_cuda_int4()
    form = weight(4, 64, zeros=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_meta = {name: each.to("meta") for name, each in vars(form).items() if isinstance(each, torch.Tensor)}
        layer = CudaInt4Linear(replace(form, **on_meta))
        y = layer(torch.empty(3, IN, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype) == ((3, OUT), torch.bfloat16)


@torch.no_grad()
def test_a_gpu_s_layer_means_what_the_weight_does(monkeypatch):
    """As torchao packs for it: the first of two numbers in the upper bits; ``(number - 8) * scale + zero``."""
    form = weight(4, 64, zeros=True)

    def mm(x, packed, group_size, scales_and_zeros):
        numbers = torch.stack((packed >> 4, packed & 15), -1).flatten(1).float() - 8
        scales, zeros = (each.T.repeat_interleave(group_size, 1).float() for each in scales_and_zeros.unbind(-1))
        return (x.float() @ (numbers * scales + zeros).T).bfloat16()

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda pairs, tiles: pairs)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", mm)
    x = inputs(3, torch.bfloat16)
    expected, magnitudes, _ = product(x, form)
    assert ((CudaInt4Linear(form)(x) - expected).abs() <= 2 * BF16_STEP * magnitudes).all()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instructions(capability, tmp_path):
    """PyTorch packs 4 bits in another order for each."""
    file = Path(__file__)
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "ONEDNN_MAX_CPU_ISA": {"default": "SSE41", "avx2": "AVX2"}[capability],
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{file}::test_products"]
    done = subprocess.run(command, env=environment, cwd=file.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
