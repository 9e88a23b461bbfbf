"""Rounding to nearest: every weight is at most half a step off, and the range is used."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_trt.quantized.rounding import round_to_nearest


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
