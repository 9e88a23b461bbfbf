"""Joined layers give what the separate ones give; FP8 ones join where that is the same arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qwen2vl_trt import ops
from qwen2vl_trt.decoder import Decoder, DecoderAttention
from qwen2vl_trt.fused_modules import FusedAttention, FusedSwiGLU, fuse_attention, fuse_decoder, fuse_mlp, join
from qwen2vl_trt.fused_ops import FusedOps
from qwen2vl_trt.layers import FP8Linear, SwiGLU
from qwen2vl_trt.rope_scaling import YarnScaling
from tests.support.bounds import BF16_STEP, FP32
from tests.support.models import model_config, our_config, random_model, relative_error

TOLERANCE = {torch.float32: FP32, torch.bfloat16: 5 * BF16_STEP}


def fp8(linear: nn.Linear, weight_scale=0.003, input_scale=0.01) -> FP8Linear:
    layer = FP8Linear(linear)
    with torch.no_grad():
        layer.weight.copy_((torch.randn(linear.weight.shape) * 50).to(torch.float8_e4m3fn))
        layer.weight_scale.fill_(weight_scale)
        layer.input_scale.fill_(input_scale)
    return layer


def fp8_mlp(hidden, intermediate, bias, dtype):
    mlp = SwiGLU(hidden, intermediate, bias).to(dtype)
    for name, linear in list(mlp.named_children()):
        setattr(mlp, name, fp8(linear, input_scale=0.1 if name == "down_proj" else 0.01))
    return mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fused_decoder_equals_a_plain_one(dtype):
    config = model_config()
    decoder = Decoder(our_config(config).text).eval()
    decoder.load_state_dict(
        {
            name.replace("model.language_model.", "model."): tensor
            for name, tensor in random_model(config).state_dict().items()
            if "visual" not in name
        }
    )
    decoder.to(dtype)
    x, positions = torch.randn(2, 7, 64, dtype=dtype), torch.arange(7).expand(3, 2, 7)
    expected, _ = decoder.model(x, positions)
    fuse_decoder(decoder, dtype)
    layer = decoder.model.layers[0]
    assert isinstance(layer.self_attn, FusedAttention)
    assert isinstance(layer.mlp, FusedSwiGLU)
    assert not any(name.endswith(("q_proj", "gate_proj")) for name, _ in decoder.named_modules())
    found, _ = decoder.model(x, positions)
    assert relative_error(found, expected) <= TOLERANCE[dtype]


@torch.no_grad()
def test_a_fused_decoder_scales_its_positions_too():
    torch.manual_seed(0)
    config = replace(our_config(model_config()).text, rope_scaling=YarnScaling(4.0, 8))
    decoder = Decoder(config).eval()
    x, positions = torch.randn(2, 30, 64), torch.arange(30).expand(3, 2, 30)
    expected, _ = decoder.model(x, positions)
    decoder.model.rotary_scale = 1.0
    without, _ = decoder.model(x, positions)
    assert relative_error(without, expected) > 1e-3
    decoder.model.rotary_scale = YarnScaling(4.0, 8).resolved_attention_factor(512)
    fuse_decoder(decoder, torch.float32)
    found, _ = decoder.model(x, positions)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_fp8_layers_of_one_scale_join(bias, dtype):
    """The intermediate size of the vision tower is no multiple of 16: channels of zeros fill it up."""
    torch.manual_seed(0)
    mlp, x = nn.Sequential(fp8_mlp(48, 84, bias, dtype)), torch.randn(3, 7, 48, dtype=dtype)
    expected = mlp(x)
    fuse_mlp(mlp, FusedOps())
    assert isinstance(mlp[0], FusedSwiGLU)
    assert mlp[0].gate_up_proj.weight.shape == (2 * 96, 48)
    assert mlp[0].down_proj.weight.shape == (48, 96)
    assert relative_error(mlp(x), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_channels_of_zeros_fill_up_other_layers_too(bias, dtype):
    torch.manual_seed(0)
    mlp, x = nn.Sequential(SwiGLU(48, 84, bias)).to(dtype), torch.randn(3, 7, 48, dtype=dtype)
    expected = mlp(x)
    fuse_mlp(mlp, FusedOps())
    assert mlp[0].gate_up_proj.weight.shape == (2 * 96, 48)
    assert mlp[0].down_proj.weight.shape == (48, 96)
    assert relative_error(mlp(x), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("scale", FP8Linear.SCALES)
@torch.no_grad()
def test_fp8_layers_of_different_scales_stay_apart(scale):
    mlp, x = nn.Sequential(fp8_mlp(48, 84, True, torch.float32)), torch.randn(3, 48)
    getattr(mlp[0].up_proj, scale).fill_(0.004)
    expected = mlp(x)
    fuse_mlp(mlp, FusedOps())
    assert isinstance(mlp[0], SwiGLU)
    assert relative_error(mlp(x), expected) <= FP32


def test_layers_of_different_kinds_stay_apart():
    linear = nn.Linear(16, 16)
    assert join([linear, fp8(nn.Linear(16, 16))]) is None
    assert join([linear, nn.Linear(16, 16, bias=False)]) is None
    attention = DecoderAttention(our_config(model_config()).text)
    attention.k_proj = fp8(attention.k_proj)
    holder = nn.Sequential(attention)
    fuse_attention(holder, FusedOps())
    assert holder[0] is attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fp8_products_equal_dequantised_ones(monkeypatch, dtype, bias):
    """``torch._scaled_mm`` as a GPU runs it; PyTorch has it on the CPU as well."""
    torch.manual_seed(0)
    layer, x = fp8(nn.Linear(48, 32, bias=bias, dtype=dtype)), torch.randn(2, 5, 48, dtype=dtype)
    expected = layer(x)
    products = []
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda *args, **others: products.append(others) or scaled_mm(*args, **others)
    )
    monkeypatch.setattr(ops, "has_scaled_mm", lambda device: True)
    assert relative_error(layer(x), expected) <= 2 * BF16_STEP  # of the product, and with the bias
    assert layer(x).shape == (2, 5, 32)
    assert products
    assert all(others["use_fast_accum"] for others in products)
    products.clear()
    odd = fp8(nn.Linear(48, 20, bias=bias, dtype=dtype))
    assert odd(x).shape == (2, 5, 20)
    assert not products, "sides that are no multiple of 16 have no FP8 product"
    layer.float()(x.float())
    assert not products, "nor has FP32"
