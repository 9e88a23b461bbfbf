"""What a checkpoint says about answers: tokens that end them, and defaults of sampling as Transformers applies them."""

import json
from types import SimpleNamespace

import pytest
import transformers

from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.runtime.generation_config import GenerationConfig
from qwen2vl_trt.runtime.sampling_params import Sampling, SamplingParams

TOKENIZER = SimpleNamespace(eos_token_id=7, pad_token_id=8)


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("files", "tokenizer", "eos", "pad"),
    [
        ({"generation_config": {"eos_token_id": [3, 4], "pad_token_id": 5}}, TOKENIZER, (3, 4), 5),
        ({"generation_config": {"eos_token_id": 3}}, TOKENIZER, (3,), 8),
        ({"generation_config": {"eos_token_id": 3}}, None, (3,), 3),
        ({"generation_config": {"temperature": 0.1}, "config": {"eos_token_id": 1}}, TOKENIZER, (7,), 8),
        ({"config": {"eos_token_id": 1}}, None, (1,), 1),
        ({"config": {"text_config": {"eos_token_id": [1, 2]}}}, None, (1, 2), 1),
        ({"generation_config": {"eos_token_id": 0, "pad_token_id": 0}}, TOKENIZER, (0,), 0),
    ],
)
def test_where_the_tokens_come_from(tmp_path, files, tokenizer, eos, pad):
    write(tmp_path, **files)
    for sampling in ("auto", "none"):
        found = GenerationConfig.from_folder(tmp_path, tokenizer, sampling)
        assert (found.eos_token_ids, found.pad_token_id) == (eos, pad)


@pytest.mark.parametrize("value", [None, [], "x", [1, "x"], -1, True])
def test_no_usable_token_is_an_error(tmp_path, value):
    write(tmp_path, generation_config={"eos_token_id": value}, config={})
    with pytest.raises(CheckpointError, match="eos_token_id is"):
        GenerationConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_corrupt_file_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationConfig.from_folder(tmp_path, TOKENIZER)


# Defaults of sampling

PUBLISHED_3B = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
PUBLISHED_7B = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.001, "top_k": 1}
TOKENS = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
READ = [
    PUBLISHED_3B,
    PUBLISHED_7B,
    {},
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.2},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "temperature": 0.7, "top_k": 0},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"do_sample": True, "min_p": 0.05},
    {"do_sample": True, "top_p": 1.0, "num_beams": 1, "typical_p": 1.0, "renormalize_logits": True},
    {"do_sample": False, "max_new_tokens": 2048, "stop_strings": ["END", "STOP"]},
]


@pytest.mark.parametrize("content", READ)
def test_defaults_are_those_of_transformers_generate(tmp_path, content):
    write(tmp_path, generation_config=content | TOKENS)
    reference = transformers.GenerationConfig.from_pretrained(tmp_path)
    reference.update(**reference._get_default_generation_params(), defaults_only=True)
    found = GenerationConfig.from_folder(tmp_path).defaults.with_defaults()
    assert found.greedy == (not reference.do_sample or reference.temperature <= 1e-5 or reference.top_k == 1)
    assert found.repetition_penalty == reference.repetition_penalty
    assert found.max_tokens == (reference.max_new_tokens or 256)
    assert found.stop == tuple(reference.stop_strings or ())
    if not found.greedy:
        expected = (reference.temperature, reference.top_p, reference.top_k, reference.min_p or 0)
        assert (found.temperature, found.top_p, found.top_k, found.min_p) == expected


def test_none_leaves_all_but_the_tokens_out(tmp_path):
    write(tmp_path, generation_config={"num_beams": 4, "do_sample": True, "temperature": "hot"} | TOKENS)
    found = GenerationConfig.from_folder(tmp_path, sampling="none")
    assert found == GenerationConfig((151645, 151643), 151643, SamplingParams())


def test_where_the_request_samples_the_checkpoints_other_settings_hold(tmp_path):
    """As in ``generate(do_sample=True, temperature=0.7)``."""
    write(tmp_path, generation_config={"do_sample": False, "top_p": 0.8, "repetition_penalty": 1.1} | TOKENS)
    defaults = GenerationConfig.from_folder(tmp_path).defaults
    assert SamplingParams(temperature=0.7).with_defaults(defaults) == Sampling(
        temperature=0.7, top_p=0.8, repetition_penalty=1.1, max_tokens_given=False
    )


def test_what_transformers_4_wrote_into_config_json_counts_where_there_is_no_other_file(tmp_path):
    write(tmp_path, config={"eos_token_id": 3, "repetition_penalty": 1.3, "hidden_size": 64, "top_k": 50})
    assert GenerationConfig.from_folder(tmp_path).defaults.repetition_penalty == 1.3
    write(tmp_path, generation_config={"eos_token_id": 3})
    assert GenerationConfig.from_folder(tmp_path).defaults.repetition_penalty is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 4),
        ("num_beam_groups", 2),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [1]),
        ("begin_suppress_tokens", [1]),
        ("forced_bos_token_id", 1),
        ("forced_eos_token_id", 1),
        ("min_p", 1.1),
        ("top_h", 0.4),
        ("typical_p", 0.9),
        ("epsilon_cutoff", 0.1),
        ("eta_cutoff", 0.1),
        ("encoder_repetition_penalty", 1.1),
        ("exponential_decay_length_penalty", [5, 1.1]),
        ("sequence_bias", [[[1], -10.0]]),
        ("guidance_scale", 1.5),
        ("min_new_tokens", 5),
        ("min_length", 5),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("max_time", 1.0),
        ("watermarking_config", {}),
        ("num_return_sequences", 2),
        ("presence_penalty", 0.5),
        ("temperature", -1),
        ("temperature", "0.1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", 1.5),
        ("top_k", 10**30),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
        ("stop_strings", [""]),
        ("stop_strings", 5),
    ],
)
def test_what_is_not_implemented_or_has_no_meaning_is_named(tmp_path, field, value):
    write(tmp_path, generation_config={field: value, "eos_token_id": 3})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field}") as raised:
        GenerationConfig.from_folder(tmp_path)
    assert "--generation-config none" in str(raised.value)
    assert "\n" not in str(raised.value)
    GenerationConfig.from_folder(tmp_path, sampling="none")


def test_every_field_of_transformers_is_known(tmp_path):
    """What its own ``save_pretrained`` and ``to_dict`` write is off or harmless."""
    own = transformers.GenerationConfig()
    write(tmp_path, generation_config=own.to_dict() | own._get_default_generation_params() | {"eos_token_id": 3})
    assert GenerationConfig.from_folder(tmp_path).defaults.with_defaults().greedy
