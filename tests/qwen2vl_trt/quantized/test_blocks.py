"""Weights in blocks equal what :meth:`QuantizedLinear.dequantize` makes of them."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_trt.quantized.blocks import BlockedWeight, blocked
from qwen2vl_trt.quantized.linear import QuantizedLinear, e2m1

OUT, IN = 6, 256


def product(x: torch.Tensor, weight: BlockedWeight) -> torch.Tensor:
    x = x.double()
    if weight.permutation is not None:
        x = x[:, weight.permutation]
    if weight.input_scale is not None:
        x = x * weight.input_scale
    blocks = x.unflatten(1, (-1, weight.block_size))
    y = (weight.values.double() * weight.scales.repeat_interleave(weight.block_size, 1)) @ x.T
    if weight.offsets is not None:
        y = y + weight.offsets.double() @ blocks.sum(2).T
    return y.T


def weight(numbers: str, group_size: int, zeros: bool = False, index: bool = False, smoothing: bool = False):
    draw = torch.Generator().manual_seed(0)
    groups = IN // group_size
    if numbers == "nvfp4":
        values = e2m1(torch.randint(16, (OUT, IN), generator=draw, dtype=torch.uint8))
    else:
        most = 16 if numbers == "int4" else 256
        values = torch.randint(most, (OUT, IN), generator=draw, dtype=torch.uint8)
        if not zeros:
            values = (values.int() - most // 2).to(torch.int8)
    return QuantizedLinear(
        values,
        torch.rand(OUT, groups, generator=draw) + 0.5,
        torch.randint(16, (OUT, groups), generator=draw, dtype=torch.uint8) if zeros else None,
        group_size,
        torch.arange(IN)[torch.randperm(IN, generator=draw)] // group_size if index else None,
        torch.rand(IN, generator=draw) if smoothing else None,
    )


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 128, 256])
@pytest.mark.parametrize("numbers", ["int4", "int8", "nvfp4"])
def test_product(numbers, group_size, zeros, index, smoothing):
    if numbers == "nvfp4" and zeros:
        pytest.skip("NVFP4 has no zero points")
    given = weight(numbers, group_size, zeros, index, smoothing)
    bits = 4 if numbers == "int4" else 8
    found = blocked(given, bits)
    assert found is not None
    assert found.bits == (4 if numbers == "int4" else 8)
    assert found.block_size == min(group_size, 128)
    assert (found.offsets is not None) == zeros
    if bits == 4:
        assert -8 <= found.values.min() <= found.values.max() <= 7
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ given.dequantize().double().T
    products = x.double().abs() @ given.dequantize().double().abs().T  # the weight is rounded to FP32, twice at most
    assert ((product(x, found) - expected).abs() <= 2**-21 * products).all()


def test_a_scale_a_channel_is_repeated():
    given = weight("int8", IN)
    found = blocked(given, 8)
    assert found is not None
    assert found.scales.shape == (OUT, 2)
    assert torch.equal(found.scales[:, :1].expand(-1, 2), found.scales)


def test_unsigned_numbers_without_zero_points():
    signed = weight("int4", 128, zeros=True)
    given = QuantizedLinear(signed.values, signed.scales, None, 128)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    found = product(x, blocked(given, 4))
    assert (found - x.double() @ given.dequantize().double().T).abs().max() < 1e-5 * found.abs().max()


@pytest.mark.parametrize("group_size", [8, 100])
def test_groups_that_make_no_blocks(group_size):
    assert blocked(weight("int4", group_size) if IN % group_size == 0 else _ragged(group_size), 4) is None


def test_an_index_of_unequal_groups():
    given = weight("int4", 128)
    index = torch.zeros(IN, dtype=torch.long)
    index[-1] = 1
    assert blocked(QuantizedLinear(given.values, given.scales, None, 128, index), 4) is None


def _ragged(group_size: int) -> QuantizedLinear:
    given = weight("int4", 128)
    return QuantizedLinear(given.values, torch.ones(OUT, -(-IN // group_size)), None, group_size)
