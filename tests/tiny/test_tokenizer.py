"""The tokenizer, the chat template and the processor files, also as Transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.tiny.batching import Collator
from qwen2vl_trt.tiny.model import config_dict
from qwen2vl_trt.tiny.tokenizer import SPECIAL_TOKENS, padded_vocab_size, train_tokenizer, write_processor_files

TEXTS = (
    "What digits are in the image?",
    "first image: 12, second image: 345",
    "31415",
    "  two  spaces, a\ttab and\n\nlines\n",
    "Größe, 漢字 and \U0001f600",
    "it's 1e-3!",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("processor")
    write_processor_files(path)
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def message(*parts: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": part} for part in parts]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]


def test_every_digit_is_its_own_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("0123456789").tokens == list("0123456789")
    assert tokenizer.encode("first image: 12").tokens[-2:] == ["1", "2"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_are_single_and_the_vocabulary_is_small(tokenizer: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token).ids == [tokenizer.token_to_id(token)]
    assert padded_vocab_size(tokenizer) % 64 == 0
    assert tokenizer.get_vocab_size() <= padded_vocab_size(tokenizer) <= 640


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer().to_str() == tokenizer.to_str()


def test_transformers_reads_the_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.pad_token == "<|endoftext|>"
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer.encode(text).ids
        assert theirs.decode(theirs(text).input_ids) == text


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), "What?"),
        (("image",), "<|vision_start|><|image_pad|><|vision_end|>What?"),
        (("image", "image"), "<|vision_start|><|image_pad|><|vision_end|>" * 2 + "What?"),
        (("video",), "<|vision_start|><|video_pad|><|vision_end|>What?"),
    ],
)
def test_the_chat_template_is_transformers(folder: Path, parts: tuple[str, ...], expected: str) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(message(*parts), tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
    collator = Collator(Qwen2VLConfig.from_dict(config_dict(train_tokenizer())), train_tokenizer())
    assert collator.prompt_ids(message(*parts)) == theirs(text).input_ids


def test_chat_template_of_several_turns(folder: Path) -> None:
    from transformers import AutoTokenizer

    turns = [
        {"role": "system", "content": "Be brief."},
        *message("image"),
        {"role": "assistant", "content": [{"type": "text", "text": "12"}]},
    ]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n12<|im_end|>\n"
    )


def test_processor_files_load(folder: Path) -> None:
    import json

    from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLConfig

    (folder / "config.json").write_text(json.dumps(config_dict(train_tokenizer())))
    config: Any = Qwen2_5_VLConfig.from_pretrained(folder)
    assert config.vision_config.depth == 4
    assert config.text_config.num_key_value_heads == 2
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.image_processor.size["shortest_edge"] == 4 * 784
    assert processor.image_processor.size["longest_edge"] == 64 * 784
    assert processor.video_processor.temporal_patch_size == 2
    generation = GenerationConfig.from_pretrained(folder)
    assert len(generation.eos_token_id) == 2
    assert generation.do_sample is False
