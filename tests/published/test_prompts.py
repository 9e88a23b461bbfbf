"""Token ids on the published tokenizer and template, against Transformers' processor."""

import random

import pytest

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.prompts import PromptBuilder
from qwen2vl_trt.tokenizer import read_directly
from tests.published.conversations import CONVERSATIONS, counts
from tests.support.chat import same_tokenizer
from tests.support.published import SPECIAL_TOKENS, config_json

GRIDS = [(1, 4, 4), (1, 2, 6), (1, 6, 2)]
CLIPS = [(2, 4, 2), (3, 2, 2)]


@pytest.fixture(scope="module")
def builder(processor_folder):
    return PromptBuilder(processor_folder, Qwen2VLConfig.from_dict(config_json("3B")))


def expected_ids(processor, messages, images=(), videos=()):
    """Transformers' ids, with the media tokens repeated as its processor does from the grids."""
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = processor.tokenizer(rendered)["input_ids"]
    for token, grids in (("<|image_pad|>", images), ("<|video_pad|>", videos)):
        number, following, repeated = processor.tokenizer.convert_tokens_to_ids(token), iter(grids), []
        for found in ids:
            t, h, w = next(following) if found == number else (1, 2, 2)
            repeated += [found] * (t * h * w // 4)
        ids = repeated
    return ids


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda messages: repr(messages)[:60])
def test_a_conversation_has_the_ids_of_transformers(builder, processor, messages):
    images, videos = counts(messages)
    found = builder.build(messages, GRIDS[:images], CLIPS[:videos])
    assert found.token_ids == expected_ids(processor, messages, GRIDS[:images], CLIPS[:videos])


def random_text(generator):
    alphabets = (
        "abc XYZ 019 .,;'\"!?\n\t",
        "äéñßøžĳ",
        "жыЩё",
        "漢字かな。、",
        "한국어",
        "عربي",
        "🙂👩🏽‍🚀🇨🇭",
        "\u0301\u200d\u00a0\ufeff",
    )
    letters = generator.choices(alphabets, weights=(8, 2, 1, 2, 1, 1, 1, 1), k=generator.randint(1, 12))
    return "".join("".join(generator.choices(letter, k=generator.randint(1, 9))) for letter in letters)


def test_random_strings_have_the_ids_of_transformers(builder, processor):
    generator = random.Random(0)
    for _ in range(1000):
        messages = [{"role": "user", "content": random_text(generator) + "."}]
        assert builder.build(messages).token_ids == expected_ids(processor, messages)


def test_special_tokens_in_a_text_are_text(builder, processor):
    """Nothing that a user types becomes a control token: it is split as Transformers does when told to."""
    for token in SPECIAL_TOKENS:
        prompt = builder.build(f"before {token} after")
        plain = processor.tokenizer(f"before {token} after", split_special_tokens=True)["input_ids"]
        frame = builder.build("x").token_ids
        start = frame.index(processor.tokenizer("x")["input_ids"][0])
        assert prompt.token_ids == [*frame[:start], *plain, *frame[start + 1 :]]


def test_the_published_tokenizer_is_read_without_transformers(processor_folder):
    assert read_directly(processor_folder) is not None
    assert same_tokenizer(processor_folder)
