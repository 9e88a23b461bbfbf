"""Quantised checkpoints as a whole: whose tensors are whose, under which names, and what is refused."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.quantization import fp8_layers
from qwen2vl_trt.quantized import awq as autoawq
from qwen2vl_trt.quantized.compressed_tensors import CompressedTensors
from qwen2vl_trt.quantized.gptq import GPTQ
from qwen2vl_trt.quantized.modelopt import ModelOptimizer
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import check_weights, load_weights
from tests.support.models import edit_checkpoint, model_config, random_model, save_model
from tests.support.quantized import awq, gptq, quantized_checkpoint, settings_of

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "modules_to_not_convert": ["visual"]}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=["published", "new"])
def folders(request, tmp_path):
    """The same model quantised to AWQ, and what it means; names in either dialect."""
    source = save_model(random_model(model_config()), tmp_path / "source", torch.bfloat16, request.param)
    return quantized_checkpoint(source, tmp_path, AWQ, partial(awq, group_size=32))


@pytest.fixture
def folder(tmp_path):
    """By the published names."""
    source = save_model(random_model(model_config()), tmp_path / "source", torch.bfloat16, "published")
    return quantized_checkpoint(source, tmp_path, AWQ, partial(awq, group_size=32))[0]


def modules(checkpoint):
    with torch.device("meta"):
        return {"visual.": VisionTransformer(checkpoint.config.vision), "": Decoder(checkpoint.config.text)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_weights_are_those_that_it_means(folders, dtype):
    quantized, plain = map(Checkpoint, folders)
    assert quantized.names == plain.names
    assert len(quantized.packed) == 14
    assert not plain.packed
    assert fp8_layers(quantized) == frozenset()
    for name in plain.names:
        assert name in quantized
        assert torch.equal(quantized.load(name), plain.load(name)), name
        assert quantized.entry(name).dtype == plain.entry(name).dtype
        assert quantized.entry(name).shape == plain.entry(name).shape
    found, expected = modules(quantized), modules(plain)
    check_weights(quantized, found)
    for prefix in found:
        load_weights(found[prefix], quantized, prefix, dtype)
        load_weights(expected[prefix], plain, prefix, dtype)
        for name, parameter in expected[prefix].state_dict().items():
            assert torch.equal(found[prefix].state_dict()[name], parameter), name


def test_its_weights_lie_nowhere(folder):
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=re.escape(f"there is no tensor '{DOWN}.weight'")):
        checkpoint.locate(f"{DOWN}.weight")
    for leaf in ("qweight", "qzeros", "scales"):
        assert f"{DOWN}.{leaf}" not in checkpoint
    assert checkpoint.weight_files == {folder / "model.safetensors"}


def test_a_layer_that_is_not_quantised_among_others_that_are(folder):
    weight = torch.randn(64, 96).half()

    def change(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DOWN)}
        return tensors | {f"{DOWN}.weight": weight}

    edit_checkpoint(folder, change)
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.packed) == 13
    assert torch.equal(checkpoint.load(f"{DOWN}.weight"), weight)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_of_layers_that_have_none(tmp_path, value):
    """AutoGPTQ writes zeros; others would change the answer."""
    source = save_model(random_model(model_config()), tmp_path / "source", torch.bfloat16, "published")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    folder, _ = quantized_checkpoint(source, tmp_path, settings, partial(gptq, group_size=32))
    bias = torch.full((64,), value).half()
    edit_checkpoint(folder, lambda tensors: tensors | {f"{DOWN}.bias": bias})
    checkpoint = Checkpoint(folder)
    if value:
        with pytest.raises(CheckpointError, match=re.escape(f"1 unexpected ({DOWN}.bias)")):
            check_weights(checkpoint, modules(checkpoint))
    else:
        check_weights(checkpoint, modules(checkpoint))


def test_a_quantised_cache_is_not_used(folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (folder / "config.json").write_text(json.dumps(config))
    scale = torch.ones(1)
    edit_checkpoint(folder, lambda tensors: tensors | {"model.layers.0.self_attn.k_scale": scale})
    checkpoint = Checkpoint(folder)
    assert fp8_layers(checkpoint) == frozenset()
    assert "asks for a quantised key-value cache" in caplog.text
    check_weights(checkpoint, modules(checkpoint))


class TestWhatIsWrong:
    @pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
    def test_a_missing_tensor(self, folder, leaf):
        edit_checkpoint(folder, lambda tensors: {n: t for n, t in tensors.items() if n != f"{DOWN}.{leaf}"})
        said = f"tensor {DOWN}.qzeros" if leaf == "qweight" else f"{folder} (AWQ): {DOWN} has no {leaf}."
        with pytest.raises(CheckpointError, match=re.escape(said)):
            Checkpoint(folder)

    @pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
    def test_a_scale_that_makes_no_sense(self, folder, scale):
        def change(tensors):
            tensors[f"{DOWN}.scales"][0, 3] = scale
            return tensors

        edit_checkpoint(folder, change)
        with pytest.raises(CheckpointError, match=rf"{re.escape(DOWN)} has a scale that is negative or no finite"):
            Checkpoint(folder).load(f"{DOWN}.weight")

    def test_another_group_size(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["group_size"] = 16
        (folder / "config.json").write_text(json.dumps(config))
        said = (
            r"model\.layers\.0\.\S+\.scales is torch.float16 \[\d+, \d+\], where \[\d+, \d+\] is expected by its other"
        )
        with pytest.raises(CheckpointError, match=said):
            Checkpoint(folder)

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            (f"{DOWN}.weight", torch.zeros(64, 96).char()),
            (f"{DOWN}.weight", torch.zeros(64, 96).to(torch.float8_e4m3fn)),
            (f"{DOWN}.weight", torch.zeros(64, 96).half()),
            ("model.layers.1.mlp.other.g_idx", torch.zeros(64).int()),
        ],
    )
    def test_another_methods_tensors(self, folder, name, tensor):
        edit_checkpoint(folder, lambda tensors: tensors | {name: tensor})
        with pytest.raises(
            CheckpointError, match=rf"tensor {re.escape(name)} \(.*\) is no part of a layer in this for"
        ):
            Checkpoint(folder)

    def test_another_shape_than_the_models(self, folder):
        parts, _ = awq(torch.randn(64, 64), 32)
        edit_checkpoint(
            folder, lambda tensors: tensors | {f"{DOWN}.{leaf}": part.contiguous() for leaf, part in parts.items()}
        )
        checkpoint = Checkpoint(folder)
        with pytest.raises(CheckpointError, match=re.escape(f"({DOWN}.weight [64, 64] instead of [64, 96])")):
            check_weights(checkpoint, modules(checkpoint))

    def test_said_and_not_done(self, tmp_path):
        save_model(random_model(model_config()), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": AWQ}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"\(AWQ\): no layer is quantised, but config.json says so"):
            Checkpoint(tmp_path)

    def test_done_and_not_said(self, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = Checkpoint(folder)
        with pytest.raises(CheckpointError, match="unexpected"):
            check_weights(checkpoint, modules(checkpoint))


def test_the_hash_is_of_the_quantised_tensors(folder):
    before = Checkpoint(folder).hash
    words = load_file(folder / "model.safetensors")[f"{DOWN}.qweight"] ^ 1
    edit_checkpoint(folder, lambda tensors: tensors | {f"{DOWN}.qweight": words})
    assert Checkpoint(folder).hash != before


PACKED = {
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
}


@pytest.mark.parametrize(
    ("form", "settings", "nulls"),
    [
        (autoawq.AWQ, {"bits": 4}, ("version", "group_size", "zero_point")),
        (GPTQ, {"bits": 4}, ("checkpoint_format", "desc_act", "group_size")),
        (CompressedTensors, PACKED, ("ignore", "transform_config", "sparsity_config")),
        (ModelOptimizer, {"quant_algo": "W4A16_AWQ"}, ("group_size", "has_zero_point")),
        (ModelOptimizer, {"quant_algo": "NVFP4"}, ("group_size",)),
    ],
)
def test_null_is_what_is_not_there(form, settings, nulls):
    assert form.of(settings_of(**settings, **dict.fromkeys(nulls))) == form.of(settings_of(**settings))
