"""The tokenizer and processor files of the tiny checkpoint: a small byte-level BPE with Qwen's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings

from . import scenes

MERGES = 320
VOCABULARY_MULTIPLE = 64
IMAGE_MEAN, IMAGE_STD = PixelSettings().image_mean, PixelSettings().image_std  # of the published checkpoints
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 64 * 28 * 28

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The pieces that text is cut into before merging, as for Qwen2: a digit always stands alone.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['image', 'image_url'] -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

PLAIN_ENGLISH = """
A small model looks at a picture and tells which digits somebody has written there. The picture may be wide, tall or
square, and the ink may be darker or lighter than the paper. When there are two pictures, the question says whether it
is about the first image, the second image, or about both of them. A video shows one digit after another, and the
answer gives them in the order in which they were shown. Numbers are always written with digits, one after the other,
without spaces between them. The user asks a question, the assistant answers it, and the system may say how.
Please describe what you see, and say how many there are, what they look like and where they stand. Is there a number
in this image? Yes, there is. No, there is not. What is the third one? Which of these is larger, and which is smaller?
Hello and good morning. I am sorry, I can not read this text, because I know only handwritten digits from zero to nine:
zero, one, two, three, four, five, six, seven, eight, nine. You can send more images at the same time.
"""


def _corpus() -> Iterator[str]:
    prompts = (
        scenes.READ_PROMPTS
        + scenes.COUNT_PROMPTS
        + scenes.FIRST_PROMPTS
        + scenes.SECOND_PROMPTS
        + scenes.BOTH_PROMPTS
        + scenes.VIDEO_PROMPTS
    )
    yield from prompts * 5
    for question, answer in scenes.CHATS:
        yield from (question, answer)
    yield from ("first image: 12, second image: 345",) * 10
    yield from ("user\n", "assistant\n", "system\n") * 20
    yield PLAIN_ENGLISH


def train_tokenizer() -> Tokenizer:
    """Train the byte-level BPE; deterministic."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return int(found)


def padded_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple of 64."""
    return -(-tokenizer.get_vocab_size() // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_processor_files(folder: Path) -> Tokenizer:
    """Write tokenizer, chat template, preprocessor and generation files of the checkpoint into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "errors": "replace",
            "model_max_length": 2048,
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    pixels: dict[str, Any] = {
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "processor_class": "Qwen2_5_VLProcessor",
    }
    _write_json(
        folder / "preprocessor_config.json",
        pixels | {"image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": True},
    )
    _write_json(
        folder / "video_preprocessor_config.json",
        pixels | {"video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False},
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [special_id(tokenizer, IM_END), special_id(tokenizer, END_OF_TEXT)],
            "pad_token_id": special_id(tokenizer, END_OF_TEXT),
            "max_new_tokens": 64,
        },
    )
    return tokenizer
