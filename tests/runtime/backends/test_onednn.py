"""Packed layers compute what plain ones do; without oneDNN the torch backend runs as it is."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engines.backends import BACKENDS
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.layers import FP8Linear, SwiGLU
from qwen2vl_trt.vision import VisionTransformer
from runtime import Pipeline, Request, SamplingParams
from runtime.backends import onednn
from tests.support.engine_folders import build
from tests.support.onednn_packing import TYPES, packing_without


def packed(dtype: torch.dtype) -> object:
    skip = pytest.mark.skipif(not onednn.available(dtype), reason=f"oneDNN packs no {dtype} on this CPU")
    return pytest.param(dtype, marks=skip)


DTYPES = [packed(torch.float32), packed(torch.bfloat16)]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[expected.dtype]
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_linear_layer_is_packed(dtype):
    tower = VisionTransformer(Qwen2VLConfig.from_folder(resolve_model("tiny").folder).vision).to(dtype)
    count = sum(isinstance(module, nn.Linear) for module in tower.modules())
    onednn.pack(tower, dtype)
    assert sum(isinstance(module, onednn.PackedLinear) for module in tower.modules()) == count
    assert not any(isinstance(module, nn.Linear) for module in tower.modules())


@pytest.fixture
def asked_anew():
    """Whether packing runs is asked once a process: here before and after the operator is another one."""
    onednn.available.cache_clear()
    yield
    onednn.available.cache_clear()


def answer(folder: Path) -> tuple[list[int], bool]:
    """The tokens of an answer, and whether the decoder has plain layers."""
    image = torch.randint(0, 256, (3, 60, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    pipeline = Pipeline.from_engine_dir(folder, "cpu")
    output = pipeline.generate(Request("What digits are in the image?", [image]), SamplingParams(max_tokens=12))[0]
    return output.token_ids, any(isinstance(module, nn.Linear) for module in pipeline.engines.decoder.module.modules())


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16-decoder"])
@pytest.mark.parametrize("without", [(torch.bfloat16,), TYPES])
def test_where_packing_fails_layers_stay_plain_and_answers_the_same(tmp_path, monkeypatch, precision, without):
    """Without AVX-512 the operator is there and raises; it did so at the first request, as a traceback."""
    folder = build(resolve_model("tiny").folder, tmp_path, "torch", precision)
    tokens, _ = answer(folder)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", packing_without(*without))
    onednn.available.cache_clear()
    plain_tokens, plain = answer(folder)
    assert plain_tokens == tokens
    if BACKENDS["torch"].precision(precision).decoder in without:
        assert plain


@pytest.mark.usefixtures("asked_anew")
def test_an_operator_of_another_signature_is_left_out(monkeypatch):
    """Private operators may change with any release of torch."""

    def two_arguments(x, weight):
        return x

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", two_arguments)
    assert not onednn.available(torch.float32)


@pytest.mark.usefixtures("asked_anew")
def test_operators_that_are_wrong_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, batch_size: weight)
    pointwise = lambda x, weight, bias, *options: nn.functional.linear(x, weight)  # noqa: E731
    pointwise.binary = lambda x, factor, weight, bias, name: nn.functional.linear(x, weight) * factor
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", pointwise)
    assert not onednn.available(torch.float32)
    assert "are wrong here" in caplog.text
