"""Checkpoints in FP8: which layers are, what is wrong with a checkpoint, and what a quantised layer computes."""

import json
import logging
import re

import pytest
import torch
from torch import nn

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.layers import FP8Linear
from qwen2vl_trt.quantization import fp8_layers, use_fp8
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import check_weights, load_weights
from tests.support.bounds import BF16_STEP, FP32
from tests.support.models import edit_checkpoint, in_fp8, model_config, random_model, save_model, write_quantization

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tmp_path):
    """A random model in FP8, by the published names."""
    save_model(random_model(model_config()), tmp_path, torch.bfloat16, "published")
    edit_checkpoint(tmp_path, in_fp8)
    write_quantization(tmp_path)
    return tmp_path


def replace_tensor(folder, name, tensor):
    edit_checkpoint(folder, lambda tensors: tensors | {name: tensor})


def drop(folder, name):
    edit_checkpoint(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})


def linear_layers(config):
    decoder = [
        f"model.layers.{i}.{name}"
        for i in range(config.text.num_hidden_layers)
        for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    ]
    tower = [
        f"visual.blocks.{i}.{name}"
        for i in range(config.vision.depth)
        for name in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    return {*decoder, *tower}


class TestLayers:
    def test_of_either_dialect(self, folder):
        checkpoint = Checkpoint(folder)
        assert fp8_layers(checkpoint) == linear_layers(checkpoint.config)
        renamed = {"visual.": "model.visual.", "model.": "model.language_model."}
        pattern = re.compile("^(visual|model)\\.")
        edit_checkpoint(folder, lambda ts: {pattern.sub(lambda m: renamed[m[0]], n): t for n, t in ts.items()})
        assert fp8_layers(Checkpoint(folder)) == linear_layers(checkpoint.config)

    def test_of_an_unquantised_checkpoint(self, tmp_path):
        assert fp8_layers(Checkpoint(save_model(random_model(model_config()), tmp_path))) == frozenset()

    def test_config_json_says_it_too(self, folder):
        (folder / "hf_quant_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
        (folder / "config.json").write_text(json.dumps(config))
        assert DOWN in fp8_layers(Checkpoint(folder))

    def test_only_some_layers(self, folder):
        original = random_model(model_config()).state_dict()
        weight = original["model.language_model.layers.1.mlp.down_proj.weight"].bfloat16()
        for scale in FP8Linear.SCALES:
            drop(folder, f"{DOWN}.{scale}")
        replace_tensor(folder, f"{DOWN}.weight", weight)
        checkpoint = Checkpoint(folder)
        assert fp8_layers(checkpoint) == linear_layers(checkpoint.config) - {DOWN}

    def test_the_method_is_part_of_the_hash(self, folder):
        before = Checkpoint(folder).hash
        write_quantization(folder, exclude_modules=["lm_head"])
        assert Checkpoint(folder).hash != before


class TestWhatIsWrong:
    @pytest.mark.parametrize("scale", FP8Linear.SCALES)
    def test_a_missing_scale(self, folder, scale):
        drop(folder, f"{DOWN}.{scale}")
        with pytest.raises(CheckpointError, match=re.escape(f"FP8 layers without a scale: {DOWN}.{scale} missing")):
            fp8_layers(Checkpoint(folder))

    @pytest.mark.parametrize("scale", FP8Linear.SCALES)
    @pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
    def test_a_scale_of_no_use(self, folder, scale, value):
        replace_tensor(folder, f"{DOWN}.{scale}", torch.tensor(value))
        with pytest.raises(CheckpointError, match=re.escape(f"{DOWN}.{scale} is {value}")):
            fp8_layers(Checkpoint(folder))

    def test_a_scale_a_channel(self, folder):
        replace_tensor(folder, f"{DOWN}.weight_scale", torch.ones(64))
        with pytest.raises(
            CheckpointError, match=rf"{DOWN}\.weight_scale is torch.float32 \[64\], not one FP32 number"
        ):
            fp8_layers(Checkpoint(folder))

    def test_the_other_fp8(self, folder):
        replace_tensor(folder, f"{DOWN}.weight", torch.zeros(64, 96).to(torch.float8_e5m2))
        with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight is torch.float8_e5m2, not torch.float8_e4m3fn"):
            fp8_layers(Checkpoint(folder))

    @pytest.mark.parametrize("algorithm", ["INT4_AWQ", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", None])
    def test_another_algorithm(self, folder, algorithm):
        write_quantization(folder, algorithm)
        with pytest.raises(
            CheckpointError,
            match=rf"hf_quant_config\.json: quantization\.quant_algo is {algorithm!r}; 'FP8', 'NVFP4', .*",
        ):
            Checkpoint(folder)

    @pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_AWQ"])
    def test_fp8_layers_among_others(self, folder, algorithm):
        write_quantization(folder, algorithm)
        with pytest.raises(
            CheckpointError, match=r"weight is torch.float8_e4m3fn \[\d+, \d+\], where torch.uint8 is ex"
        ):
            Checkpoint(folder)

    @pytest.mark.parametrize("method", ["awq", "hqq", None])
    def test_two_methods(self, folder, method):
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="says NVIDIA Model Optimizer, quantization_config in"):
            Checkpoint(folder)

    def test_nothing_says_how(self, folder):
        (folder / "hf_quant_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"is FP8, but neither hf_quant_config\.json nor config\.json says"):
            fp8_layers(Checkpoint(folder))

    def test_said_and_not_done(self, tmp_path):
        save_model(random_model(model_config()), tmp_path)
        write_quantization(tmp_path)
        with pytest.raises(CheckpointError, match="has no FP8 weight"):
            fp8_layers(Checkpoint(tmp_path))

    def test_an_embedding(self, folder):
        edit_checkpoint(folder, lambda tensors: in_fp8(tensors, lambda name: "embed_tokens" in name))
        with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is FP8; only the weights of linear"):
            fp8_layers(Checkpoint(folder))

    def test_a_norm(self, folder):
        name = "model.layers.1.input_layernorm"
        edit_checkpoint(
            folder,
            lambda tensors: (
                tensors
                | {f"{name}.weight": torch.ones(64).to(torch.float8_e4m3fn)}
                | {f"{name}.{scale}": torch.tensor(1.0) for scale in FP8Linear.SCALES}
            ),
        )
        checkpoint = Checkpoint(folder)
        with pytest.raises(CheckpointError, match=r"1\.input_layernorm\.weight is FP8; only the weights of linear"):
            modules(checkpoint, fp8_layers(checkpoint))

    def test_a_quantised_cache_is_mentioned_and_its_scales_are_left(self, folder, caplog):
        write_quantization(folder, kv_cache_quant_algo="FP8")
        for name in "kv":
            replace_tensor(folder, f"model.layers.0.self_attn.{name}_proj.{name}_scale", torch.tensor(0.1))
        checkpoint = Checkpoint(folder)
        with caplog.at_level(logging.WARNING):
            layers = fp8_layers(checkpoint)
        assert "asks for a quantised key-value cache (FP8); here it stays in the decoder's type" in caplog.text
        check_weights(checkpoint, modules(checkpoint, layers))


def modules(checkpoint, layers):
    with torch.device("meta"):
        return {
            "visual.": use_fp8(VisionTransformer(checkpoint.config.vision), "visual.", layers),
            "": use_fp8(Decoder(checkpoint.config.text), "", layers),
        }


def test_loading_keeps_the_types_of_the_quantisation(folder):
    replace_tensor(folder, f"{DOWN}.weight_scale", torch.tensor([0.25]))  # [1] instead of []
    checkpoint = Checkpoint(folder)
    for prefix, module in modules(checkpoint, fp8_layers(checkpoint)).items():
        load_weights(module, checkpoint, prefix, torch.bfloat16)
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            quantised = isinstance(module.get_submodule(owner), FP8Linear)
            expected = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32, "input_scale": torch.float32}
            assert parameter.dtype == (expected.get(leaf, torch.bfloat16) if quantised else torch.bfloat16), name
            if quantised and leaf == "weight":
                assert torch.equal(parameter.view(torch.uint8), checkpoint.load(prefix + name).view(torch.uint8))
        assert not any(
            isinstance(child, nn.Linear)
            for name, child in module.named_modules()
            if "blocks" in name or "layers" in name
        )
    assert module.get_submodule("model.layers.1.mlp.down_proj").weight_scale == torch.tensor(0.25)


def test_a_quantised_output_projection_beside_a_tied_embedding(folder):
    """Model Optimizer's lm_head quantisation: the embedding keeps its own BF16 tensor."""
    head = Checkpoint(folder).load("model.embed_tokens.weight").float().clone()
    edit_checkpoint(folder, lambda ts: in_fp8(ts | {"lm_head.weight": head}, lambda name: name == "lm_head.weight"))
    checkpoint = Checkpoint(folder)
    layers = fp8_layers(checkpoint)
    assert "lm_head" in layers
    module = modules(checkpoint, layers)[""]
    load_weights(module, checkpoint, "", torch.bfloat16)
    assert module.lm_head.weight.dtype == torch.float8_e4m3fn
    assert module.model.embed_tokens.weight.dtype == torch.bfloat16


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()]


def nearest(x):
    """The E4M3 number nearest to each of ``x``, ties to an even mantissa, by looking at all of them."""
    positive = E4M3[E4M3 >= 0].unique()  # by magnitude; the index is the code, its last bit the mantissa's
    distance = (x.abs()[..., None] - positive).abs()
    best = distance.min(-1, keepdim=True).values
    odd = torch.arange(len(positive)) % 2
    index = (torch.where(distance == best, 0.0, 9.0) + odd).argmin(-1)
    return positive[index] * x.sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_against_float64(dtype, bias):
    torch.manual_seed(1)
    layer = FP8Linear(nn.Linear(96, 40, bias=bias, dtype=dtype))
    layer.weight.copy_((torch.randn(40, 96) * 100).to(torch.float8_e4m3fn))
    layer.weight_scale.fill_(0.0123)
    layer.input_scale.fill_(0.0371)
    x = torch.randn(5, 7, 96, dtype=dtype) * 6
    x[0, 0, :3] = torch.tensor([100.0, -100.0, 0.0])  # beyond 448 scales: saturates
    scale, weight_scale = layer.input_scale.double(), layer.weight_scale.double()
    expected = (nearest(x.double() / scale) * scale) @ (layer.weight.double() * weight_scale).T
    expected += layer.bias.double() if bias else 0
    found = layer(x)
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: FP32, torch.bfloat16: 2 * BF16_STEP}[dtype]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = FP8Linear(nn.Linear(16, 8))

    def forward(self, x):
        return self.layer(x)


def test_the_exported_form_equals_the_eager_form():
    module, x = Layers().eval(), torch.randn(3, 16)
    with torch.no_grad():
        module.layer.weight.copy_(torch.randn(8, 16).to(torch.float8_e4m3fn))
        module.layer.input_scale.fill_(0.01)
        program = torch.export.export(module, (x,), strict=False)
        assert (program.module()(x) - module(x)).abs().max() < 1e-5
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("qwen2vl_trt.round_to_fp8.default") == called.count("qwen2vl_trt.dequantize_fp8.default") == 1
