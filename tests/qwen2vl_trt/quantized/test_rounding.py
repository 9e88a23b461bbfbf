"""Rounding to nearest: every weight is at most half a step off, and the range is used."""

from __future__ import annotations

import math

import pytest
import torch

from qwen2vl_trt.quantized.linear import e2m1
from qwen2vl_trt.quantized.rounding import nvfp4_global_scale, round_to_nearest, round_to_nvfp4
from tests.support.quantized import E2M1


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_a_step(bits, block, dtype):
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = round_to_nearest(weight, bits, block)
    assert (found.values.dtype, found.values.shape) == (torch.int8, weight.shape)
    assert (found.scales.dtype, found.scales.shape) == (torch.float32, (6, 256 // block))
    assert (found.group_size, found.zero_points) == (block, None)
    half = 2 ** (bits - 1)
    assert -half <= found.values.min() <= found.values.max() <= half - 1
    blocks = weight.float().unflatten(1, (-1, block))
    assert torch.allclose(found.scales * (half - 0.5), blocks.abs().amax(2))
    off = (found.dequantize() - weight.float()).abs().unflatten(1, (-1, block))
    assert (off <= found.scales[..., None] * (0.5 + 1e-4)).all()  # the largest too: 7.5 steps become 7 or -8


def test_a_block_of_zeros():
    found = round_to_nearest(torch.zeros(2, 64), 4, 32)
    assert not found.values.any()
    assert (found.scales > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_by_the_scales_that_are_stored(dtype):
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weight, 8, 64, dtype)
    assert torch.equal(found.scales.to(dtype).float(), found.scales)
    inside = (found.values > -128) & (found.values < 127)  # a scale may be rounded down
    off = (found.dequantize() - weight).abs() / found.scales.repeat_interleave(64, 1)
    assert (off[inside] <= 0.5 + 1e-4).all()
    assert (off <= 1).all()
    assert (round_to_nearest(torch.zeros(2, 64), 8, 64, dtype).scales > 0).all()


class TestNVFP4:
    def test_the_nearest_number_and_ties_to_even(self):
        """In blocks whose largest number is 6 and whose scale is 1."""
        sizes = torch.arange(0, 6.0625, 0.0625)
        weight = torch.stack((sizes, -sizes))
        weight = torch.cat((weight[:, :96].unflatten(1, (-1, 12)), torch.full((2, 8, 4), 6.0)), 2).flatten(1)
        codes, scales = round_to_nvfp4(weight, torch.tensor(1.0))
        assert (scales.float() == 1).all()
        numbers = torch.tensor(E2M1[:8])
        for value, found in zip(weight.flatten().tolist(), e2m1(codes).float().flatten().tolist(), strict=True):
            distances = (numbers - abs(value)).abs()
            nearest = [i for i in range(8) if distances[i] == distances.min()]
            expected = next(i for i in nearest if len(nearest) == 1 or i % 2 == 0)  # the last bit of its code is 0
            assert found == math.copysign(E2M1[expected], value), value

    def test_the_whole_range_of_scales_is_used(self):
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        weight[0] *= 1e-4
        overall = nvfp4_global_scale(weight.abs().max())
        codes, scales = round_to_nvfp4(weight, overall)
        assert scales.float().max() == 448
        steps = scales.float() / overall
        off = (e2m1(codes).float().unflatten(1, (-1, 16)) * steps[..., None] - weight.unflatten(1, (-1, 16))).abs()
        assert (off <= steps[..., None] * (1 + 6 * 2**-4)).all()  # 4 to 6 is 2 steps; E4M3 rounds scales by 2**-4
        assert e2m1(codes)[0].float().any(), "small blocks have small scales"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_zeros(self, dtype):
        weight = torch.zeros(2, 32, dtype=dtype)
        codes, scales = round_to_nvfp4(weight, nvfp4_global_scale(weight.abs().max()))
        assert not codes.any()
        assert (scales.float() > 0).all()
