"""What an adapter makes of a checkpoint, by arithmetic in FP64; and each thing that does not fit, by name."""

import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.export.weights import merged_checkpoint
from qwen2vl_trt.lora import Adapter
from tests.support.adapters import ATTENTION, MLP, factors, merged_by_hand, modules, weights, write_adapter
from tests.support.models import edit_checkpoint, in_fp8, model_config, published_names, random_model, save_model
from tests.support.quantized import awq, quantized_checkpoint

DECODER = "model.language_model.layers"
VISION = "model.visual"
QUERY = f"{DECODER}.1.self_attn.q_proj"
PATCHES = f"{VISION}.patch_embed.proj"


@pytest.fixture(scope="module")
def model():
    return random_model(model_config(tied=False), seed=4)


@pytest.fixture(scope="module", params=["new", "published"])
def dialect(request):
    """Of the adapter's names; the checkpoint has the other one."""
    return request.param


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory, dialect):
    other = {"new": "published", "published": "new"}[dialect]
    return save_model(model, tmp_path_factory.mktemp("model") / "checkpoint", dialect=other, shards=3)


def merged(checkpoint, adapter, tmp_path):
    """The tensors of the merged checkpoint, by the names of Transformers."""
    with merged_checkpoint(Checkpoint(checkpoint), Adapter.read(adapter), tmp_path / "merged") as made:
        return {name: made.load(name).clone() for name in made.names}


def check(model, folder, adapter, tensors, scale, tmp_path):
    """Every tensor is what FP64 arithmetic says, and those that the adapter does not name are as they were."""
    other = merged_by_hand(random_model(model.config, seed=4), tensors, scale)
    expected = published_names(other.state_dict())
    found = published_names(merged(folder, adapter, tmp_path))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].reshape(tensor.shape), rtol=1e-6, atol=1e-6)
    before = published_names({name: Checkpoint(folder).load(name) for name in Checkpoint(folder).names})
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, before[name])}
    named = {key.partition(".lora_")[0] + ".weight" if ".lora_" in key else key for key in tensors}
    assert changed == set(published_names(dict.fromkeys(named)))


CASES = {
    "a list of names": (("q_proj", "v_proj"), {"target_modules": ["q_proj", "v_proj"]}, 2),
    "all-linear": ((*ATTENTION, *MLP, "qkv", "attn.proj", "mlp.0", "mlp.2"), {"target_modules": "all-linear"}, 2),
    "rslora": (ATTENTION, {"target_modules": list(ATTENTION), "use_rslora": True}, 4),
    "a fraction": (MLP, {"target_modules": list(MLP), "lora_alpha": 1.5}, 0.375),
    "the vision tower": (
        ("qkv", "patch_embed.proj", "attn.proj", "merger.mlp.0", "merger.mlp.2"),
        {"target_modules": r".*visual.*\.(qkv|proj|mlp\.[02])"},
        2,
    ),
    "layers": (
        ("layers.1.mlp.up_proj", "blocks.1.mlp.up_proj"),
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        2,
    ),
    "one layer of a pattern": (
        ("layers.1.mlp.up_proj",),
        {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        2,
    ),
    "excluded": (
        ("layers.1.mlp.up_proj", "layers.0.mlp.up_proj"),
        {"target_modules": ["up_proj"], "exclude_modules": r".*visual.*"},
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_arithmetic(model, folder, dialect, tmp_path, case):
    ends, config, scale = CASES[case]
    tensors = factors(model, modules(model, *ends))
    adapter = write_adapter(tmp_path / "adapter", tensors, dialect, **config)
    check(model, folder, adapter, tensors, lambda name: scale, tmp_path)


def test_ranks_and_alphas_of_single_modules(model, folder, dialect, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 6}, "alpha_pattern": {"1.mlp.up_proj": 3}}
    names = modules(model, "q_proj", "layers.0.mlp.up_proj", "layers.1.mlp.up_proj")
    ranks = {name: 2 if name.endswith("q_proj") else 6 if ".0." in name else 4 for name in names}
    alphas = {name: 3 if name.endswith("1.mlp.up_proj") else 8 for name in names}
    tensors = factors(model, names, ranks=ranks)
    config = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*visual.*"} | patterns
    adapter = write_adapter(tmp_path / "adapter", tensors, dialect, **config)
    check(model, folder, adapter, tensors, lambda name: alphas[name] / ranks[name], tmp_path)


def test_modules_to_save_and_biases_take_the_places_of_the_models(model, folder, dialect, tmp_path):
    state = model.state_dict()
    saved = {name: tensor + 0.1 for name, tensor in state.items() if ".merger." in name or name == "lm_head.weight"}
    assert len(saved) == 6
    saved[f"{QUERY}.bias"] = state[f"{QUERY}.bias"] * 2
    tensors = factors(model, [QUERY]) | saved
    written = {name.replace("q_proj.bias", "q_proj.base_layer.bias"): tensor for name, tensor in tensors.items()}
    config = {"target_modules": ["1.self_attn.q_proj"], "modules_to_save": ["merger", "lm_head"], "bias": "lora_only"}
    adapter = write_adapter(tmp_path / "adapter", written, dialect, **config)
    check(model, folder, adapter, tensors, lambda name: 2, tmp_path)


def test_an_embedding(model, folder, dialect, tmp_path):
    """PEFT's ``lora_embedding_A`` is ``[r, V]``; it saves the embedding itself too (``save_embedding_layers``)."""
    name, generator = "model.language_model.embed_tokens", torch.Generator().manual_seed(1)
    vocabulary, width = model.get_submodule(name).weight.shape
    down, up = torch.randn(4, vocabulary, generator=generator), torch.randn(width, 4, generator=generator)
    base = model.get_submodule(name).weight * 0.5
    tensors = {f"{name}.lora_embedding_A": down, f"{name}.lora_embedding_B": up, f"{name}.base_layer.weight": base}
    adapter = write_adapter(tmp_path / "adapter", tensors, dialect, target_modules=["embed_tokens"])
    expected = {f"{name}.weight": base + 2 * (up @ down).T}
    check(model, folder, adapter, expected, None, tmp_path)


def test_dora_and_a_bias_of_b(model, folder, dialect, tmp_path):
    """The rows of ``W + scale * B @ A`` get the lengths of the magnitude vector."""
    tensors = factors(model, [QUERY, PATCHES])
    generator, expected = torch.Generator().manual_seed(1), {}
    for name in (QUERY, PATCHES):
        weight = model.get_submodule(name).weight.double()
        up, down = (tensors[f"{name}.lora_{part}.weight"].double().flatten(1) for part in "BA")
        rows = weight.flatten(1) + 2 * up @ down
        magnitude = torch.rand(len(rows), generator=generator) + 0.5
        one = [1] * (weight.ndim - 2)
        tensors[f"{name}.lora_magnitude_vector"] = magnitude if weight.ndim == 2 else magnitude.view(1, -1, *one)
        rows *= (magnitude.double() / rows.square().sum(1).sqrt())[:, None]
        expected[f"{name}.weight"] = rows.view(weight.shape).float()
    config = {"target_modules": ["1.self_attn.q_proj", "patch_embed.proj"], "use_dora": True}
    adapter = write_adapter(tmp_path / "adapter", tensors, dialect, **config)
    check(model, folder, adapter, expected, None, tmp_path)

    tensors = factors(model, [QUERY])
    more = torch.randn(len(model.get_submodule(QUERY).bias), generator=generator)
    config = {"target_modules": ["1.self_attn.q_proj"], "lora_bias": True}
    biased = tensors | {f"{QUERY}.lora_B.bias": more}
    adapter = write_adapter(tmp_path / "biased", biased, dialect, **config)
    expected = tensors | {f"{QUERY}.bias": model.get_submodule(QUERY).bias + 2 * more}
    check(model, folder, adapter, expected, lambda name: 2, tmp_path)


def test_it_is_rounded_once(model, tmp_path):
    """In BF16: the nearest value to the exact sum, where a rounded ``B @ A`` would be off by one in many places."""
    folder = save_model(model, tmp_path / "checkpoint", torch.bfloat16)
    stored = load_file(folder / "model.safetensors")[f"{QUERY}.weight"]
    tensors = {name: tensor.bfloat16() for name, tensor in factors(model, [QUERY]).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["1.self_attn.q_proj"])
    found = merged(folder, adapter, tmp_path)[f"{QUERY}.weight"]
    delta = 2 * tensors[f"{QUERY}.lora_B.weight"].double() @ tensors[f"{QUERY}.lora_A.weight"].double()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (stored.double() + delta).float().bfloat16())
    assert not torch.equal(found, stored + delta.bfloat16())


def test_files_without_a_changed_tensor_are_linked_and_the_checkpoint_stays(model, tmp_path):
    folder = save_model(model, tmp_path / "checkpoint", shards=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = write_adapter(tmp_path / "adapter", factors(model, [QUERY]), target_modules=["1.self_attn.q_proj"])
    checkpoint = Checkpoint(folder)
    with merged_checkpoint(checkpoint, Adapter.read(adapter), tmp_path / "merged") as made:
        own = checkpoint.locate(f"{QUERY}.weight").path.name
        same = {path.name: path.samefile(folder / path.name) for path in made.folder.glob("*.safetensors")}
        assert same == {name: name != own for name in before if name.endswith("safetensors")}
        assert made.hash != checkpoint.hash
        assert [made.locate(name).offset for name in made.names] == [
            checkpoint.locate(name).offset for name in made.names
        ]
    assert not (tmp_path / "merged").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_that_changes_nothing(model, tmp_path):
    folder = save_model(model, tmp_path / "checkpoint")
    tensors = factors(model, [QUERY])
    tensors[f"{QUERY}.lora_B.weight"].zero_()
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["1.self_attn.q_proj"])
    with merged_checkpoint(Checkpoint(folder), Adapter.read(adapter), tmp_path / "merged") as made:
        assert made.hash == Checkpoint(folder).hash


# What does not fit


@pytest.fixture
def refusal(model, tmp_path):
    """Writes an adapter of one module, changed as a test says, and gives the message of the refusal."""

    def refusal(change=lambda tensors: tensors, checkpoint=None, **config):
        checkpoint = checkpoint or save_model(model, tmp_path / "checkpoint")
        tensors = change(factors(model, [QUERY]))
        config = {"target_modules": ["1.self_attn.q_proj"]} | config
        adapter = write_adapter(tmp_path / "adapter", tensors, **config)
        with pytest.raises(CheckpointError) as error:
            Adapter.read(adapter).changes(Checkpoint(checkpoint))
        assert "\n" not in str(error.value)
        assert str(adapter) in str(error.value)
        return str(error.value)

    return refusal


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type is 'IA3'; only 'LORA' can be merged"),
        ({"peft_type": None}, r"peft_type is None; only 'LORA'"),
        ({"r": 0}, r"adapter_config\.json: r is 0; expected `int` >= 1"),
        ({"bias": "some"}, r"bias is 'some'; invalid enum value"),
        ({"target_modules": "(q_proj"}, r"target_modules has '\(q_proj', which is no regular expression"),
        ({"layers_pattern": ["layers", "("]}, r"layers_pattern has '\(', which is no regular expression"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights is 'pissa_niter_4'; only True or .* is supported"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication is \[\[0, 2\]\]; only None or False"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"use_qalora": True}, r"use_qalora is True"),
        ({"use_magic": True}, r"use_magic is not known and may change the answer"),
    ],
    ids=str,
)
def test_configurations(refusal, config, said):
    assert re.search(said, refusal(**config))


def renamed(old, new, tensors):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def with_more(more, tensors):
    return tensors | {name: tensor.clone() for name, tensor in more.items()}


TINY = torch.ones(4)
CHANGES = {
    "another model's layer": (
        partial(renamed, "layers.1", "layers.7"),
        {},
        r"layers\.7\.self_attn\.q_proj is not in .*: it is an adapter of another model",
    ),
    "names that are none": (
        partial(renamed, "q_proj", "query"),
        {},
        r"self_attn\.query is not in",
    ),
    "shapes": (
        lambda tensors: {name: tensor[:, :3].contiguous() for name, tensor in tensors.items()},
        {},
        r"q_proj\.lora_A\.weight \[4, 3\] does not fit .*q_proj\.weight \[64, 64\] of .* at rank 4: it is an adapter",
    ),
    "another rank": (lambda tensors: tensors, {"r": 8}, r"lora_A\.weight \[4, 64\] does not fit .* at rank 8"),
    "no B": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora_A" in name},
        {},
        r"q_proj\.lora_B is missing",
    ),
    "NaN": (
        lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()},
        {},
        r"q_proj\.lora_A\.weight has values that are not finite",
    ),
    "no tensors": (lambda tensors: {}, {"target_modules": None}, r"adapter_model\.safetensors has no tensors"),
    "a magnitude without DoRA": (
        partial(with_more, {f"{QUERY}.lora_magnitude_vector": torch.ones(64)}),
        {},
        r"lora_magnitude_vector is not what adapter_config\.json says \(use_dora, lora_bias\)",
    ),
    "DoRA without a magnitude": (
        lambda tensors: tensors,
        {"use_dora": True},
        r"q_proj\.lora_magnitude_vector is missing",
    ),
    "a key left over": (
        partial(with_more, {"model.language_model.norm.weight": torch.ones(64)}),
        {},
        r"norm\.weight belongs to no LoRA layer, and neither modules_to_save \(None\) nor bias \('none'\)",
    ),
    "a bias of none": (partial(with_more, {f"{QUERY}.bias": torch.ones(64)}), {}, r"q_proj\.bias belongs to no LoRA"),
    "a key of another kind": (
        partial(with_more, {f"{QUERY}.token_adapter.trainable_tokens_delta": TINY}),
        {},
        r"trainable_tokens_delta is not in",
    ),
    "both namings": (
        lambda tensors: with_more(published_names(tensors), tensors),
        {},
        r"self_attn\.q_proj\.lora_[AB]\.weight and model\..*\.self_attn\.q_proj\.lora_[AB]\.weight are the same weight",
    ),
    "target modules that match others": (
        lambda tensors: tensors,
        {"target_modules": ["v_proj"]},
        r"it has weights of .*q_proj, which target_modules of adapter_config\.json \(\['v_proj'\]\) does not match",
    ),
    "target modules that match more": (
        lambda tensors: tensors,
        {"target_modules": ["q_proj"]},
        r"target_modules or modules_to_save of .* name .*layers\.0\.self_attn\.q_proj, of which .* has no weights",
    ),
    "modules to save that are not there": (
        lambda tensors: tensors,
        {"modules_to_save": ["score"]},
        r"modules_to_save of .* name score, of which",
    ),
    "half a module to save": (
        partial(with_more, {f"{VISION}.merger.ln_q.weight": torch.ones(64)}),
        {"modules_to_save": ["merger"]},
        r"name model\.visual\.merger\.mlp\.0\.bias, .* and 1 more, of which",
    ),
    "another shape of a module to save": (
        partial(with_more, {"lm_head.weight": torch.ones(97, 64)}),
        {"modules_to_save": ["lm_head"]},
        r"lm_head\.weight \[97, 64\] does not fit lm_head\.weight \[96, 64\]",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_tensors(refusal, case):
    change, config, said = CHANGES[case]
    assert re.search(said, refusal(change, **config))


def test_tied_embeddings(refusal, tmp_path):
    """Half of the pair, or a pair that was trained apart, makes a model that is not tied any more."""
    tied = save_model(random_model(model_config(tied=True)), tmp_path / "tied")
    more = {"lm_head.weight": torch.ones(96, 64)}
    message = refusal(partial(with_more, more), checkpoint=tied, modules_to_save=["lm_head"])
    assert "it changes lm_head.weight, but model.embed_tokens.weight and lm_head.weight of" in message
    assert "are one tensor (tie_word_embeddings)" in message


def test_a_quantised_checkpoint(model, refusal, tmp_path):
    """Also where the quantised layer is not one of the adapter's: it would be built in FP8, which merges before."""
    folder = save_model(model, tmp_path / "quantised")
    edit_checkpoint(folder, lambda tensors: in_fp8(tensors, lambda name: "visual.blocks.0.mlp.up_proj" in name))
    message = refusal(checkpoint=folder)
    assert "is quantised: model.visual.blocks.0.mlp.up_proj.weight (torch.float8_e4m3fn)" in message
    assert "Take the unquantised checkpoint: --precision fp8, int8, int4 or nvfp4 quantises the merged one" in message


def test_a_checkpoint_in_awq(model, refusal, tmp_path):
    settings, write = {"quant_method": "awq", "bits": 4, "group_size": 32}, partial(awq, group_size=32)
    quantized_checkpoint(save_model(model, tmp_path / "plain"), tmp_path / "both", settings, write)
    message = refusal(checkpoint=tmp_path / "both" / "quantized")
    assert re.search(r"both/quantized is quantised: \S+_proj\.weight \(AWQ\)", message)
    assert "Take the unquantised checkpoint" in message


def test_values_beyond_the_checkpoints_type(model, tmp_path):
    folder = save_model(model, tmp_path / "checkpoint", torch.float16)
    tensors = {name: tensor * 1e3 for name, tensor in factors(model, [QUERY]).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=["1.self_attn.q_proj"])
    with pytest.raises(CheckpointError, match=r"q_proj\.weight, it gives values beyond the range of torch\.float16"):
        merged(folder, adapter, tmp_path)
    assert not (tmp_path / "merged").exists()


class TestFolder:
    def test_that_is_none(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"is no adapter: it has no adapter_config\.json \(PEFT's layout\)"):
            Adapter.read(tmp_path)

    def test_without_weights(self, model, tmp_path):
        write_adapter(tmp_path, factors(model, [QUERY]))
        weights(tmp_path).unlink()
        with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
            Adapter.read(tmp_path)
        (tmp_path / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"pickled adapter_model\.bin, which is not read"):
            Adapter.read(tmp_path)

    def test_with_a_truncated_file(self, model, tmp_path):
        write_adapter(tmp_path, factors(model, [QUERY]))
        whole = weights(tmp_path).read_bytes()
        weights(tmp_path).write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
            Adapter.read(tmp_path)

    def test_with_names_that_are_not_pefts(self, model, tmp_path):
        write_adapter(tmp_path, factors(model, [QUERY]), prefix="")
        with pytest.raises(CheckpointError, match=r"is no name of PEFT's: it does not begin with base_model\.model\."):
            Adapter.read(tmp_path)

    def test_the_hash_is_of_both_files(self, model, tmp_path):
        tensors = factors(model, [QUERY])
        hashes = [Adapter.read(write_adapter(tmp_path, tensors)).hash for _ in range(2)]
        hashes.append(Adapter.read(write_adapter(tmp_path, tensors, lora_alpha=9)).hash)
        hashes.append(Adapter.read(write_adapter(tmp_path, {name: 2 * each for name, each in tensors.items()})).hash)
        assert hashes[0] == hashes[1]
        assert len(set(hashes)) == 3
