"""Names and tensors of Transformers' checkpoints, in both dialects, tied and untied, into modules."""

import gc
import importlib.machinery
import json
import mmap
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qwen2vl_trt.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from qwen2vl_trt.decoder import Decoder as OurDecoder
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import (
    EMBEDDING,
    LM_HEAD,
    PATCH_EMBEDDING,
    check_weights,
    checkpoint_names,
    load_weights,
    map_names,
)
from tests.support.models import edit_checkpoint, save_model


def make_config(tied):
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 96,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
            "tie_word_embeddings": tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=88,
        vision_end_token_id=89,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request):
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(make_config(request.param))


def published_name(name):
    """The name in the published checkpoints of a name in Transformers' modules."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def published_weights(model):
    """What ``model`` holds, by the published names; a tied output projection is listed too."""
    return {published_name(name): tensor for name, tensor in model.state_dict().items()}


def rewrite(folder, change):
    """Replace the tensors of a checkpoint in one file by ``change(tensors)``."""
    tensors = change(load_file(folder / SINGLE_FILE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE)


def nested_name(name):
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.fixture(params=["published", "nested", "sharded"])
def folder(reference, request, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="30KB" if request.param == "sharded" else "1GB")
    if request.param == "nested":
        rewrite(tmp_path, lambda tensors: {nested_name(name): tensor for name, tensor in tensors.items()})
    return tmp_path


class Tower(nn.Module):
    """Stands for our vision tower: Transformers' modules, the patch embedding as a linear layer."""

    def __init__(self, model):
        super().__init__()
        original = model.model.visual
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(3 * 2 * 14 * 14, original.patch_embed.proj.out_channels, bias=False)
        self.blocks, self.merger = original.blocks, original.merger


class Decoder(nn.Module):
    """Stands for our decoder."""

    def __init__(self, model, head=True):
        super().__init__()
        self.model = nn.Module()
        for name in ("embed_tokens", "layers", "norm"):
            self.model.add_module(name, getattr(model.model.language_model, name))
        if head:
            self.lm_head = model.lm_head


def make_modules(reference, head=True):
    with torch.device("meta"):
        empty = Qwen2_5_VLForConditionalGeneration(reference.config)
        return Tower(empty), Decoder(empty, head)


def test_sharded_checkpoint_has_many_shards(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / INDEX_FILE).is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 3


def test_both_dialects_map_to_the_published_names(reference, folder):
    names = checkpoint_names(Checkpoint(folder))
    expected = published_weights(reference)
    assert set(names) == set(expected)
    assert set(names.values()) <= set(Checkpoint(folder).names)


def test_whole_model_loads(reference, folder):
    checkpoint = Checkpoint(folder)
    tower, decoder = make_modules(reference)
    check_weights(checkpoint, {"visual.": tower, "": decoder})
    load_weights(tower, checkpoint, "visual.")
    load_weights(decoder, checkpoint)
    loaded = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()} | decoder.state_dict()
    expected = published_weights(reference)
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert loaded[name].device.type == "cpu"
        assert torch.equal(loaded[name], tensor.reshape(loaded[name].shape)), name


@pytest.mark.parametrize("half", ["vision", "decoder", "inner decoder"])
def test_halves_load_alone(reference, folder, half):
    tower, decoder = make_modules(reference)
    module, prefix = {
        "vision": (tower, "visual."),
        "decoder": (decoder, ""),
        "inner decoder": (decoder.model, "model."),
    }[half]
    load_weights(module, Checkpoint(folder), prefix)
    assert not any(parameter.is_meta for parameter in module.parameters())


def test_our_own_modules_take_every_tensor(reference, folder):
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        tower, decoder = VisionTransformer(checkpoint.config.vision), OurDecoder(checkpoint.config.text)
    check_weights(checkpoint, {"visual.": tower, "": decoder})
    load_weights(tower, checkpoint, "visual.")
    load_weights(decoder, checkpoint)
    tensors = [*tower.parameters(), *tower.buffers(), *decoder.parameters(), *decoder.buffers()]
    assert tensors
    assert not any(tensor.is_meta for tensor in tensors)


def test_dtype_is_converted(reference, folder):
    tower, _ = make_modules(reference)
    load_weights(tower, Checkpoint(folder), "visual.", dtype=torch.bfloat16)
    expected = published_weights(reference)["visual.blocks.0.mlp.up_proj.weight"]
    assert all(parameter.dtype == torch.bfloat16 for parameter in tower.parameters())
    assert torch.equal(tower.blocks[0].mlp.up_proj.weight, expected.to(torch.bfloat16))


def test_matrices_stay_as_the_checkpoint_has_them_where_they_may(reference, folder):
    tower, _ = make_modules(reference)
    load_weights(tower, Checkpoint(folder), "visual.", dtype=torch.bfloat16, mapped=True)
    stored = published_weights(reference)
    for name, parameter in tower.named_parameters():
        expected = stored[f"visual.{name}"].reshape(parameter.shape)
        assert torch.equal(parameter, expected if parameter.ndim > 1 else expected.to(torch.bfloat16))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_each_matrix_maps_its_own_part_of_the_file(reference, folder):
    """A map of the whole file for each of them would be terabytes; and nothing stays once they are gone."""

    def mapped():
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
        return sum(int(end, 16) - int(start, 16) for start, _, end in (line[0].partition("-") for line in lines))

    tower, _ = make_modules(reference)
    load_weights(tower, Checkpoint(folder), "visual.", mapped=True)
    matrices = [parameter for parameter in tower.parameters() if parameter.ndim > 1]
    pages = 2 * mmap.PAGESIZE * len(matrices)
    assert 0 < mapped() <= sum(each.nbytes for each in matrices) + pages
    del tower, matrices
    gc.collect()
    assert mapped() == 0


def test_loaded_tensors_do_not_depend_on_the_file(reference, folder):
    _, decoder = make_modules(reference)
    load_weights(decoder, Checkpoint(folder))
    expected = decoder.model.norm.weight.clone()
    for path in folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(decoder.model.norm.weight, expected)
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_linear_patch_embedding_computes_the_convolution(reference, folder):
    tower, _ = make_modules(reference)
    load_weights(tower, Checkpoint(folder), "visual.")
    patches = torch.randn(5, 3 * 2 * 14 * 14)
    expected = reference.model.visual.patch_embed(patches)
    torch.testing.assert_close(tower.patch_embed.proj(patches), expected, rtol=1e-5, atol=1e-5)


def test_tied_parameters_share_memory(reference, folder):
    tied = reference.config.tie_word_embeddings
    checkpoint = Checkpoint(folder)
    _, decoder = make_modules(reference)
    decoder.lm_head = nn.Linear(32, 96, bias=False, device="meta")  # a parameter of its own before loading
    load_weights(decoder, checkpoint)
    assert (decoder.lm_head.weight is decoder.model.embed_tokens.weight) == tied
    assert (LM_HEAD in checkpoint.names) != tied


def test_tied_checkpoint_with_both_or_only_the_head(tmp_path):
    torch.manual_seed(1)
    model = Qwen2_5_VLForConditionalGeneration(make_config(tied=True))
    model.save_pretrained(tmp_path)
    embedding = model.lm_head.weight.detach()

    rewrite(tmp_path, lambda tensors: tensors | {LM_HEAD: embedding.clone()})
    tower, decoder = make_modules(model)
    load_weights(decoder, Checkpoint(tmp_path))
    assert torch.equal(decoder.lm_head.weight, embedding)
    tower, headless = make_modules(model, head=False)
    check_weights(Checkpoint(tmp_path), {"visual.": tower, "": headless})

    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != EMBEDDING})
    _, decoder = make_modules(model)
    load_weights(decoder, Checkpoint(tmp_path))
    assert torch.equal(decoder.model.embed_tokens.weight, embedding)
    assert decoder.model.embed_tokens.weight is decoder.lm_head.weight


def test_computed_buffers_are_ignored(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "visual.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    rewrite(tmp_path, lambda tensors: tensors | extra)
    tower, decoder = make_modules(reference)
    check_weights(Checkpoint(tmp_path), {"visual.": tower, "": decoder})


def load_both(tower, decoder, checkpoint):
    load_weights(tower, checkpoint, "visual.")
    load_weights(decoder, checkpoint)


def broken(reference, folder, change):
    """The messages of both ways to load a checkpoint after ``change(tensors)``."""
    reference.save_pretrained(folder)
    rewrite(folder, change)
    checkpoint = Checkpoint(folder)
    tower, decoder = make_modules(reference)
    with pytest.raises(CheckpointError) as checked:
        check_weights(checkpoint, {"visual.": tower, "": decoder})
    with pytest.raises(CheckpointError) as loaded:
        load_both(tower, decoder, checkpoint)
    assert str(folder) in str(checked.value)
    assert "\n" not in str(checked.value)
    return str(checked.value), str(loaded.value)


@pytest.mark.parametrize("name", ["visual.blocks.1.norm2.weight", "model.layers.1.self_attn.q_proj.bias"])
def test_missing_tensor_is_named(reference, tmp_path, name):
    def drop(tensors):
        assert name in tensors
        return {key: tensor for key, tensor in tensors.items() if key != name}

    for message in broken(reference, tmp_path, drop):
        assert f"1 missing ({name})" in message


@pytest.mark.parametrize("name", ["visual.blocks.9.norm2.weight", "model.layers.0.mlp.up_proj.weight_scale"])
def test_extra_tensor_is_named(reference, tmp_path, name):
    for message in broken(reference, tmp_path, lambda tensors: tensors | {name: torch.ones(2)}):
        assert f"1 unexpected ({name})" in message


def test_tensor_of_no_known_part_is_found_by_the_check(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"audio.weight": torch.ones(2)})
    tower, decoder = make_modules(reference)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(audio\.weight\)"):
        check_weights(Checkpoint(tmp_path), {"visual.": tower, "": decoder})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (33,)),
        ("model.layers.0.mlp.up_proj.weight", (32, 48)),  # as many elements, another shape
        (PATCH_EMBEDDING, (16, 3, 2, 14, 15)),
        (PATCH_EMBEDDING, (32, 3, 1, 14, 14)),
    ],
)
def test_misshapen_tensor_is_named_with_both_shapes(reference, tmp_path, name, shape):
    for message in broken(reference, tmp_path, lambda tensors: tensors | {name: torch.zeros(shape)}):
        assert f"1 misshapen ({name} {list(shape)} instead of [" in message


def test_one_tensor_of_two_parameters_is_named_once(tmp_path):
    """A vocabulary that grew after config.json was written, with tied embeddings."""
    model = Qwen2_5_VLForConditionalGeneration(make_config(tied=True))
    tower, decoder = make_modules(model)
    for change, said in (
        (lambda tensors, name: tensors | {name: torch.zeros(100, 32)}, "[100, 32] instead of [96, 32]"),
        (lambda tensors, name: tensors | {name: tensors[name].to(torch.int8)}, "torch.int8"),
        (lambda tensors, name: {key: value for key, value in tensors.items() if key != name}, "1 missing"),
    ):
        folder = save_model(model, tmp_path / said, dialect="published")
        edit_checkpoint(folder, partial(change, name="model.embed_tokens.weight"))
        with pytest.raises(CheckpointError) as caught:
            check_weights(Checkpoint(folder), {"visual.": tower, "": decoder})
        assert said in str(caught.value)
        assert str(caught.value).count("embed_tokens") == 1
        assert "lm_head" not in str(caught.value)


def test_whole_numbers_are_no_weights(reference, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    for message in broken(reference, tmp_path, lambda tensors: tensors | {name: tensors[name].to(torch.int8)}):
        assert f"1 not of floating point ({name} torch.int8)" in message


def test_long_lists_are_counted(reference, tmp_path):
    def keep_no_vision(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}

    message, _ = broken(reference, tmp_path, keep_no_vision)
    count = sum(name.startswith("visual.") for name in published_weights(reference))
    assert f"{count} missing (visual." in message
    assert ", ...)" in message
    assert message.count("visual.") == 5


def test_nothing_is_loaded_when_something_is_wrong(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"model.norm.weight": torch.ones(3)})
    _, decoder = make_modules(reference)
    with pytest.raises(CheckpointError):
        load_weights(decoder, Checkpoint(tmp_path))
    assert all(parameter.is_meta for parameter in decoder.parameters())


def test_one_weight_twice_is_refused():
    names = ["model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="same weight"):
        map_names(names)


# TensorRT-LLM's mapper


class FakeMapper:
    """Does what the documentation of ``Qwen2VLHfWeightMapper.filter_weights`` says."""

    calls = 0

    def filter_weights(self, prefix, weights):
        type(self).calls += 1
        renamed = {}
        for name, value in weights.items():
            if name.startswith("model.language_model."):
                name = "model." + name[len("model.language_model.") :]
            if name.startswith(prefix):
                renamed[name[len(prefix) + 1 :]] = value
        return renamed


def install(monkeypatch, mapper):
    path = "tensorrt_llm._torch.models.checkpoints.hf.qwen2vl_weight_mapper"
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, loader=None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if mapper is not None:
        sys.modules[path].Qwen2VLHfWeightMapper = mapper


def test_names_go_through_tensorrt_llm_where_it_is_installed(reference, folder, monkeypatch):
    names = [*Checkpoint(folder).names, "audio.weight", "modelling"]
    tied = reference.config.tie_word_embeddings
    ours = map_names(names, tied)
    monkeypatch.setattr(FakeMapper, "calls", 0)
    install(monkeypatch, FakeMapper)
    assert map_names(names, tied) == ours
    assert FakeMapper.calls > 0


def test_a_new_rule_of_tensorrt_llm_is_taken_over(monkeypatch):
    class NewerMapper(FakeMapper):
        def filter_weights(self, prefix, weights):
            return super().filter_weights(
                prefix, {name.replace("model.lm.", "model."): weights[name] for name in weights}
            )

    install(monkeypatch, NewerMapper)
    assert map_names(["model.lm.norm.weight"]) == {"model.norm.weight": "model.lm.norm.weight"}


def test_a_broken_tensorrt_llm_falls_back_with_a_warning(monkeypatch, caplog):
    install(monkeypatch, None)
    assert map_names(["model.visual.x"]) == {"visual.x": "model.visual.x"}
    assert "weight mapper does not load" in caplog.text


def test_config_decides_whether_embeddings_are_tied(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["tie_word_embeddings"] = raw["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert (LM_HEAD in checkpoint_names(Checkpoint(tmp_path))) != reference.config.tie_word_embeddings
