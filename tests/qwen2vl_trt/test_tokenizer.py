"""A tokenizer that is read without Transformers is the one that Transformers loads."""

import json
import subprocess
import sys

import pytest
from tokenizers import AddedToken

from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.tokenizer import read_directly
from tests.support.chat import SPECIAL, make_tokenizer, same_tokenizer, save_tokenizer

TINY = resolve_model("tiny").folder


def write(folder, name, change):
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | change))


def test_the_tiny_models_tokenizer_is_read_directly():
    assert read_directly(TINY) is not None
    assert same_tokenizer(TINY)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"additional_special_tokens": SPECIAL},
        {"extra_special_tokens": SPECIAL[:2], "bos_token": "<|im_start|>", "unk_token": None},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True, "normalized": False}},
        {"add_bos_token": True, "add_prefix_space": False, "padding_side": "left", "model_max_length": 8},
        {
            "added_tokens_decoder": {
                str(256 + index): {"content": token, "special": True, "normalized": False}
                for index, token in enumerate(SPECIAL)
            }
        },
    ],
)
def test_what_the_configuration_repeats(tmp_path, change):
    write(save_tokenizer(tmp_path), "tokenizer_config.json", change)
    assert read_directly(tmp_path) is not None
    assert same_tokenizer(tmp_path)


@pytest.mark.parametrize("pad", ["<|endoftext|>", None])
def test_truncation_and_padding_of_the_file_are_left_out(tmp_path, pad):
    """Transformers takes the padding's token where nothing names another."""
    write(save_tokenizer(tmp_path), "tokenizer_config.json", {"pad_token": pad})
    tokenizer = make_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (read_directly(tmp_path) is None) == (pad is None)
    assert same_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": ["<|new|>"]}),
        ("tokenizer_config.json", {"bos_token": "<s>"}),
        ("tokenizer_config.json", {"bos_token": "a"}),  # of the vocabulary, and not special there
        ("tokenizer_config.json", {"extra_special_tokens": {"one_token": "<|one|>"}}),
        ("tokenizer_config.json", {"image_token": "<|image_pad|>"}),
        ("tokenizer_config.json", {"add_prefix_space": True}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"264": {"content": "<|new|>", "special": True}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"256": {"content": "<|endoftext|>", "lstrip": True}}}),
        ("special_tokens_map.json", {"bos_token": "<s>"}),
        ("added_tokens.json", {"<|new|>": 264}),
    ],
)
def test_what_says_more_is_loaded_by_transformers(tmp_path, name, change):
    write(save_tokenizer(tmp_path), name, change)
    assert read_directly(tmp_path) is None
    assert same_tokenizer(tmp_path)


def test_an_added_token_that_is_not_special_stays_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    tokenizer.chat_template = "x"
    tokenizer.save_pretrained(tmp_path)
    assert read_directly(tmp_path) is not None
    assert same_tokenizer(tmp_path)


def test_prompts_need_no_transformers():
    code = (
        "import sys; from qwen2vl_trt.prompts import PromptBuilder; from qwen2vl_trt.config import Qwen2VLConfig;"
        f"builder = PromptBuilder({str(TINY)!r}, Qwen2VLConfig.from_folder({str(TINY)!r})); assert builder.build('a');"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
