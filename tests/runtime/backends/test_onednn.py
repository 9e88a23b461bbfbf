"""Packed layers compute what plain ones do; without oneDNN the torch backend runs as it is."""

import pytest
import torch
from torch import nn

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.layers import FP8Linear, SwiGLU
from qwen2vl_trt.vision import VisionTransformer
from runtime import Pipeline, Request, SamplingParams
from runtime.backends import onednn
from tests.support.engine_folders import build

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch lacks the oneDNN operators")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[expected.dtype]
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_packed_layers_equal_plain_ones(dtype, shape, bias):
    torch.manual_seed(0)
    x = torch.randn(*shape, 48, dtype=dtype)
    linear = nn.Linear(48, 33, bias=bias, dtype=dtype)
    assert close(onednn.PackedLinear(linear)(x), linear(x))
    mlp = SwiGLU(48, 85, bias=bias).to(dtype)
    assert close(onednn.PackedSwiGLU(mlp)(x), mlp(x))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_packed_fp8_layers_equal_plain_ones(dtype, bias):
    torch.manual_seed(0)
    mlp = SwiGLU(48, 85, bias=bias).to(dtype)
    for name, linear in list(mlp.named_children()):
        layer = FP8Linear(linear)
        layer.weight.copy_((torch.randn(linear.weight.shape) * 50).to(torch.float8_e4m3fn))
        layer.weight_scale.fill_(0.003)
        layer.input_scale.fill_(0.01)
        setattr(mlp, name, layer)
    x = torch.randn(3, 7, 48, dtype=dtype)
    expected = mlp(x)
    onednn.pack(mlp, dtype)
    assert isinstance(mlp.down_proj, onednn.PackedFP8Linear)
    assert close(mlp(x), expected)


@needs_onednn
def test_every_linear_layer_is_packed():
    tower = VisionTransformer(Qwen2VLConfig.from_folder(resolve_model("tiny").folder).vision)
    count = sum(isinstance(module, nn.Linear) for module in tower.modules())
    onednn.pack(tower, torch.float32)
    assert sum(isinstance(module, onednn.PackedLinear) for module in tower.modules()) == count
    assert not any(isinstance(module, nn.Linear) for module in tower.modules())


def test_without_onednn_answers_are_the_same(tmp_path, monkeypatch):
    folder = build(resolve_model("tiny").folder, tmp_path, "torch", "fp32")
    image = torch.randint(0, 256, (3, 60, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    request, params = Request("What digits are in the image?", [image]), SamplingParams(max_tokens=12)
    packed = Pipeline.from_engine_dir(folder, "cpu").generate(request, params)[0].token_ids
    monkeypatch.setattr(onednn, "available", lambda: False)
    plain = Pipeline.from_engine_dir(folder, "cpu")
    assert plain.generate(request, params)[0].token_ids == packed
    assert any(isinstance(module, nn.Linear) for module in plain.engines.decoder.module.modules())
