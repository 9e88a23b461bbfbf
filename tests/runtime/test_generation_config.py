"""End-of-sequence and padding tokens, wherever a checkpoint names them."""

import json
from types import SimpleNamespace

import pytest

from qwen2vl_trt.errors import CheckpointError
from runtime.generation_config import GenerationConfig

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
    assert GenerationConfig.from_folder(tmp_path, tokenizer) == GenerationConfig(eos, pad)


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
