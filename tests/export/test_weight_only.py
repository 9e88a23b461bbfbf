"""Checkpoints whose decoder is quantised to 4 and 8 bits: what is in them, and what is not touched."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_trt.checkpoint import INDEX_FILE, Checkpoint, write_tensors
from qwen2vl_trt.errors import BuildError, CheckpointError
from qwen2vl_trt.export.weight_only import decoder_linears, quantize_weights
from qwen2vl_trt.quantized.rounding import round_to_nearest
from qwen2vl_trt.weights import checkpoint_names
from tests.support.models import edit_checkpoint, model_config, random_model, save_model

NUMBERS = ["int4", "int8", "nvfp4"]


def layers_of(checkpoint):
    """The checkpoint's names of the layers to quantise, and of those that each is joined with."""
    names = checkpoint_names(checkpoint)
    return {
        names[f"{layer}.weight"]: [names[f"{name}.weight"] for name in joined]
        for layer, joined in decoder_linears(checkpoint).items()
    }


@pytest.fixture(params=NUMBERS)
def written(request, tied_model, tmp_path):
    """A BF16 model in three shards, and what was made of it."""
    source = Checkpoint(tied_model.checkpoint)
    return source, quantize_weights(source, tmp_path / "made", request.param), request.param


class TestTheCheckpoint:
    def test_seven_layers_a_block_and_nothing_else(self, written):
        source, made, numbers = written
        assert made.packed.keys() == layers_of(source).keys()
        assert len(made.packed) == 7 * source.config.text.num_hidden_layers
        assert {weight.numbers for weight in made.packed.values()} == {numbers}
        assert made.names == source.names
        for name in set(source.names) - made.packed.keys():
            assert torch.equal(made.load(name), source.load(name)), name
            assert made.load(name).dtype == source.load(name).dtype

    def test_weights_are_near(self, written):
        source, made, numbers = written
        for name in made.packed:
            found, exact = made.load(name).float(), source.load(name).float()
            assert (found - exact).norm() / exact.norm() < {"int4": 0.15, "int8": 0.01, "nvfp4": 0.15}[numbers]

    def test_files_are_those_of_the_model(self, written):
        source, made, _ = written
        assert {path.name for path in made.weight_files} == {path.name for path in source.weight_files}
        index = json.loads((made.folder / INDEX_FILE).read_text())
        stored = {path.name: load_file(path) for path in made.weight_files}
        assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
        sizes = [tensor.nbytes for tensors in stored.values() for tensor in tensors.values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        for path in source.companions:
            if path.name not in ("config.json", INDEX_FILE):
                assert (made.folder / path.name).read_bytes() == path.read_bytes()
        config = json.loads((made.folder / "config.json").read_text())
        assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
        assert config == json.loads((source.folder / "config.json").read_text())

    def test_what_is_ignored_by_vllm_and_transformers(self, written):
        """By the names of both."""
        settings = json.loads((written[1].folder / "config.json").read_text())["quantization_config"]
        (group,) = settings["config_groups"].values()
        assert group["targets"] == ["Linear"]
        plain = ["lm_head", "language_model.lm_head", "visual.merger.mlp.0", "model.visual.blocks.0.attn.qkv"]
        quantised = ["model.layers.0.mlp.up_proj", "language_model.model.layers.1.self_attn.q_proj"]
        for name in (*plain, *quantised):
            ignored = any(re.match(pattern.removeprefix("re:"), name) for pattern in settings["ignore"])
            assert ignored == (name in plain), name


def test_a_model_in_one_file_of_fp32(untied_model, tmp_path):
    """Of odd widths, too: a scale a channel; scales of 16 bits, as vLLM holds them."""
    source = Checkpoint(untied_model.checkpoint)
    made = quantize_weights(source, tmp_path / "made", "int8")
    assert not (made.folder / INDEX_FILE).exists()
    name = "model.layers.1.mlp.down_proj.weight"
    rounded = round_to_nearest(source.load(name), 8, 201, torch.bfloat16)
    assert torch.equal(made.packed[name].read().dequantize(), rounded.dequantize())
    assert made.load("lm_head.weight").dtype == torch.float32


def test_layers_that_vllm_joins_share_their_global_scale(tied_model, tmp_path):
    """vLLM takes the largest of them for all, and with it wrong weights where they differ."""
    source = Checkpoint(tied_model.checkpoint)
    made = quantize_weights(source, tmp_path / "made", "nvfp4")
    scales = {name: t for path in made.weight_files for name, t in load_file(path).items() if "global_scale" in name}
    for name, joined in layers_of(source).items():
        largest = max(float(source.load(other).abs().max()) for other in joined)
        found = float(scales[f"{name.removesuffix('weight')}weight_global_scale"])
        assert found == pytest.approx(6 * 448 / largest, rel=1e-6), name
    assert len({float(scale) for scale in scales.values()}) == 4 * source.config.text.num_hidden_layers


def test_changes(tied_model, tmp_path):
    source = Checkpoint(tied_model.checkpoint)
    names = checkpoint_names(source)
    changes = {"model.layers.0.mlp.up_proj.weight": lambda t: 2 * t, "model.layers.0.input_layernorm.weight": torch.neg}
    made = quantize_weights(source, tmp_path / "made", "int8", changes)
    plain = quantize_weights(source, tmp_path / "plain", "int8")
    up, norm = (names[name] for name in changes)
    assert torch.equal(made.load(up), 2 * plain.load(up))
    assert torch.equal(made.load(norm), -source.load(norm))


def test_a_tensor_is_in_memory_at_a_time(tmp_path):
    """The next one is made when the one before is written."""
    there = []

    def tensors():
        for name in "ab":
            there.append((tmp_path / "x").stat().st_size if name == "b" else 0)
            yield name, torch.ones(1 << 20)

    write_tensors(tmp_path / "x", dict.fromkeys("ab", torch.empty(1 << 20, device="meta")), tensors())
    assert there[1] >= 4 << 20
    assert {name: float(tensor.sum()) for name, tensor in load_file(tmp_path / "x").items()} == dict.fromkeys(
        "ab", 1 << 20
    )


class TestWhatGoesWrong:
    def test_widths_without_blocks(self, untied_model, tmp_path):
        with pytest.raises(BuildError, match="NVFP4 has blocks of 16 input channels, which do not divide the widths"):
            quantize_weights(Checkpoint(untied_model.checkpoint), tmp_path / "made", "nvfp4")
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("numbers", NUMBERS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite(self, tmp_path, numbers, value):
        folder = save_model(random_model(model_config()), tmp_path / "model", torch.bfloat16, dialect="published")

        def change(tensors):
            tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
            return tensors

        edit_checkpoint(folder, change)
        with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.[qk]_proj.weight' has numbers that are"):
            quantize_weights(Checkpoint(folder), tmp_path / "made", numbers)

    def test_a_layer_is_missing(self, tmp_path):
        folder = save_model(random_model(model_config()), tmp_path / "model", dialect="published")
        name = "model.layers.1.mlp.up_proj.weight"
        edit_checkpoint(folder, lambda tensors: {each: tensors[each] for each in tensors if each != name})
        with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
            quantize_weights(Checkpoint(folder), tmp_path / "made", "int8")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_disk(self, tmp_path):
        (tmp_path / "x").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            write_tensors(tmp_path / "x", {"a": torch.ones(1 << 16)}, [("a", torch.ones(1 << 16))])
