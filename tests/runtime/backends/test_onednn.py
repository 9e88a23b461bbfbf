"""Packed layers compute what plain ones do; without oneDNN the torch backend runs as it is."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen2vl_trt import Pipeline, Request, SamplingParams
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.layers import FP8Linear, SwiGLU
from qwen2vl_trt.runtime.backends import onednn
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.vision import VisionTransformer
from tests.support.bounds import BF16_STEP, FP32
from tests.support.engine_folders import build
from tests.support.models import relative_error
from tests.support.onednn_packing import TYPES, PackingWithout


def packed(dtype: torch.dtype) -> object:
    skip = pytest.mark.skipif(not onednn.available(dtype), reason=f"oneDNN packs no {dtype} on this CPU")
    return pytest.param(dtype, marks=skip)


DIGITS = Path(__file__).resolve().parents[3] / "docs" / "digits.png"
DTYPES = [packed(torch.float32), packed(torch.bfloat16)]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Of SwiGLU three numbers are rounded to BF16, and a product of two of them; then the result."""
    return relative_error(found, expected) <= {torch.float32: FP32, torch.bfloat16: 5 * BF16_STEP}[expected.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", onednn.PACKED)
@torch.no_grad()
def test_packed_layers_equal_plain_ones(dtype, shape, bias, layout):
    torch.manual_seed(0)
    x = torch.randn(*shape, 48, dtype=dtype)
    linear = nn.Linear(48, 33, bias=bias, dtype=dtype)
    assert close(onednn.PackedLinear(linear, layout)(x), linear(x))
    mlp = SwiGLU(48, 85, bias=bias).to(dtype)
    assert close(onednn.PackedSwiGLU(mlp, layout)(x), mlp(x))


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
    onednn.pack(mlp, dtype, "one row")
    assert isinstance(mlp.down_proj, onednn.PackedFP8Linear)
    assert close(mlp(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_linear_layer_is_packed(dtype):
    tower = VisionTransformer(Qwen2VLConfig.from_folder(resolve_model("tiny").folder).vision).to(dtype)
    count = sum(isinstance(module, nn.Linear) for module in tower.modules())
    onednn.pack(tower, dtype, "many rows")
    assert sum(isinstance(module, onednn.PackedLinear) for module in tower.modules()) == count
    assert not any(isinstance(module, nn.Linear) for module in tower.modules())


@pytest.mark.parametrize("dtype", [packed(torch.float32)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("part", [1, 48 * 10, 2**20])
@torch.no_grad()
def test_weights_of_another_type_are_converted_in_parts(dtype, bias, part, monkeypatch):
    monkeypatch.setattr(onednn, "_PART", part)
    torch.manual_seed(0)
    stored = nn.ModuleList([SwiGLU(48, 85, bias=bias), nn.Linear(48, 33, bias=bias), nn.Linear(33, 7)]).bfloat16()
    for linear in (module for module in stored.modules() if isinstance(module, nn.Linear) and module.bias is not None):
        linear.bias.data = linear.bias.data.to(dtype)
    expected = copy.deepcopy(stored).to(dtype)
    onednn.pack(stored, dtype, "many rows")
    for found, plain in zip(stored, expected):
        x = torch.randn(3, 33 if plain is expected[2] else 48, dtype=dtype)
        assert close(found(x), plain(x))
    assert (len(stored[1].weights) > 1) == (part < 33 * 48)


def test_the_rows_of_a_decoder():
    assert onednn.decoder_rows(1) == (1, 256)
    assert onednn.decoder_rows(16) == (1, 16, 256)


@pytest.fixture
def asked_anew():
    """Whether packing runs is asked once a process: here before and after the operator is another one."""
    onednn.available.cache_clear()
    yield
    onednn.available.cache_clear()


def answer(folder: Path) -> tuple[str, bool]:
    """What the tiny model reads in a picture, and whether its decoder has plain layers."""
    pipeline = Pipeline.from_engine_dir(folder, "cpu")
    output = pipeline.generate(Request("What digits are in the image?", [DIGITS]), SamplingParams(max_tokens=12))[0]
    return output.text, any(isinstance(module, nn.Linear) for module in pipeline.engines.decoder.module.modules())


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16-decoder"])
@pytest.mark.parametrize("without", [(), (torch.bfloat16,), TYPES])
def test_where_packing_fails_layers_stay_plain_and_answers_right(tmp_path, monkeypatch, precision, without):
    """Without AVX-512 the operator is there and raises for BF16; that ended the first request in a traceback."""
    folder = build(resolve_model("tiny").folder, tmp_path, "torch", precision)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", PackingWithout(*without))
    monkeypatch.setattr(onednn, "_seconds", lambda layout, dtype, rows: 1.0)
    onednn.available.cache_clear()
    text, plain = answer(folder)
    assert text == "92059"
    dtype = BACKENDS["torch"].precision(precision).decoder
    assert plain == (not onednn.available(dtype))
    assert plain or dtype not in without


@pytest.mark.parametrize(
    ("rows", "plain", "few", "many", "chosen"),
    [
        ((1, 512), (1, 1), (1, 1), (1, 1), "one row"),
        ((1, 512), (1, 1), (1, 1), (0.5, 1), "many rows"),
        ((1, 512), (0.7, 0.9), (1, 1), (0.9, 0.9), "plain"),
        ((1, 512), (0.9, 0.95), (1, 1), (1, 1), "one row"),  # within what a busy moment takes
        ((1, 512), (0.5, 4), (1, 1), (2, 1), "one row"),
        ((512,), (9, 0.95), (9, 1), (9, 1), "many rows"),
        ((512,), (9, 0.8), (9, 1), (9, 1), "plain"),
        ((512,), (9, 0.8), (9, 0.7), (9, 1), "one row"),
    ],
)
def test_the_layout_follows_from_what_products_take(rows, plain, few, many, chosen, monkeypatch):
    """Times of 1 and of 512 rows."""
    times = {
        (layout, each): taken
        for layout, pair in (("plain", plain), ("one row", few), ("many rows", many))
        for each, taken in zip((1, 512), pair)
    }
    monkeypatch.setattr(onednn, "available", lambda dtype: True)
    monkeypatch.setattr(onednn, "_seconds", lambda layout, dtype, rows: times[layout, rows])
    assert onednn.fastest(torch.float32, rows) == chosen


@pytest.mark.parametrize("layout", ["plain", *onednn.PACKED])
def test_a_decoder_has_the_layout_that_was_chosen(layout, tmp_path, monkeypatch):
    """For as many rows as there are slots, and no weight twice."""
    engines = open_engines(build(resolve_model("tiny").folder, tmp_path, "torch", "fp32"), "cpu")
    wanted = (1, engines.manifest.profile.max_num_seqs, 256)
    monkeypatch.setattr(onednn, "fastest", lambda dtype, rows: layout if rows == wanted else "plain")
    packed = []
    monkeypatch.setattr(onednn, "_packed", lambda weight, layout: packed.append(layout) or weight)
    decoder, tower = engines.decoder.module, engines.vision.module
    layers = 7 * decoder.config.num_hidden_layers + 1
    assert packed == ([] if layout == "plain" else [layout] * layers)
    assert sum(isinstance(module, nn.Linear) for module in decoder.modules()) == (layers if layout == "plain" else 0)
    assert any(isinstance(module, nn.Linear) for module in tower.modules())


@pytest.mark.parametrize("layout", ["plain", *onednn.PACKED])
@pytest.mark.parametrize("rows", [1, 512])
def test_a_product_is_timed(layout, rows, monkeypatch):
    if layout != "plain" and not onednn.available(torch.float32):
        pytest.skip("oneDNN packs no FP32 on this CPU")
    monkeypatch.setattr(onednn, "_BYTES", 2**20)
    assert 0 < onednn._seconds.__wrapped__(layout, torch.float32, rows) < 60


@pytest.mark.usefixtures("asked_anew")
def test_an_operator_of_another_signature_is_left_out(monkeypatch, caplog):
    """Private operators may change with any release of torch."""

    def two_arguments(x, weight):
        return x

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", two_arguments)
    assert not onednn.available(torch.float32)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "weights are reordered in every call" in record.message


@pytest.mark.usefixtures("asked_anew")
def test_operators_that_are_wrong_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, batch_size: weight)
    pointwise = lambda x, weight, bias, *options: nn.functional.linear(x, weight)  # noqa: E731
    pointwise.binary = lambda x, factor, weight, bias, name: nn.functional.linear(x, weight) * factor
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", pointwise)
    assert not onednn.available(torch.float32)
    assert "are wrong here" in caplog.text


def test_processes_that_tests_start_have_no_packing_either(tmp_path):
    """With --no-onednn-packing, which tests/conftest.py passes on so."""
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(root / "tests" / "support" / "no_onednn_packing"), str(root)])
    code = "import torch; from qwen2vl_trt.runtime.backends import onednn; sys.exit(onednn.available(torch.float32))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}"], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path
    )
    assert done.returncode == 0
