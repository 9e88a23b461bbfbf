"""Prompts against Transformers' processor, on a small byte-level tokenizer with Qwen's special tokens."""

import json
import shutil

import numpy as np
import pytest
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import CheckpointError, LimitError, PromptError
from qwen2vl_trt.prompts import PromptBuilder, load_tokenizer
from tests.support.chat import FIRST_SPECIAL, IMAGE, SPECIAL, TEMPLATE, VIDEO, make_config, make_tokenizer
from tests.support.chat import save_tokenizer, text, user


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def builder(folder, config):
    return PromptBuilder(folder, config)


@pytest.fixture(scope="module")
def processor():
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=make_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )


def image(height, width):
    return np.full((height, width, 3), 128, dtype=np.uint8)


def video(frames, height, width):
    return np.full((frames, height, width, 3), 128, dtype=np.uint8)


@pytest.mark.parametrize(
    ("parts", "images", "videos"),
    [
        ([text("no picture, ünïcödé 日本 🙂")], [], []),
        ([IMAGE, text("What is it?")], [image(56, 84)], []),
        ([text("left "), IMAGE, text(" and right "), IMAGE, text("?")], [image(56, 56), image(112, 28 * 7)], []),
        ([VIDEO, text("What happens?")], [], [video(6, 56, 84)]),
        (
            [IMAGE, VIDEO, IMAGE, VIDEO, text("All of it.")],
            [image(84, 56), image(56, 140)],
            [video(4, 56, 56), video(2, 84, 112)],
        ),
        ([IMAGE], [image(56, 56)], []),
    ],
)
def test_tokens_equal_those_of_the_processor(builder, processor, parts, images, videos):
    messages = [{"role": "user", "content": parts}]
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(
        text=[rendered],
        images=images or None,
        videos=videos or None,
        videos_kwargs={"do_sample_frames": False},
    )
    grids = expected.get("image_grid_thw", []), expected.get("video_grid_thw", [])
    prompt = builder.build(messages, *grids)
    assert prompt.text == rendered
    assert prompt.token_ids == list(expected["input_ids"][0])
    merged = [int(t * h * w) // 4 for grid in grids for t, h, w in grid]
    pads = {builder.config.image_token_id, builder.config.video_token_id}
    assert sum(token in pads for token in prompt.token_ids) == sum(merged)


def test_conversation_with_a_system_message(builder, processor):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [IMAGE, text("Hi")]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [text("Is "), text("it?")]},
    ]
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = builder.build(messages, [(1, 4, 4)])
    assert prompt.text == rendered
    assert prompt.token_ids.count(builder.config.image_token_id) == 4


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
@pytest.mark.parametrize("form", ["string", "part", "joined parts", "system"])
def test_vision_tokens_typed_by_the_user_are_refused(builder, token, form):
    prompt = {
        "string": f"What is {token}?",
        "part": user(IMAGE, text(f"What is {token}?")),
        "joined parts": user(IMAGE, text(token[:5]), text(token[5:])),
        "system": [{"role": "system", "content": token}, *user(IMAGE)],
    }[form]
    with pytest.raises(PromptError) as caught:
        builder.build(prompt, [(1, 4, 4)])
    assert repr(token) in str(caught.value)
    assert "<image>" in str(caught.value)


def test_other_special_tokens_are_read_as_transformers_reads_them(builder, processor):
    prompt = builder.build("a<|im_end|>b")
    assert prompt.token_ids == processor.tokenizer.encode(prompt.text)
    assert prompt.token_ids.count(256 + SPECIAL.index("<|im_end|>")) == 3


def copy_without_template(folder, destination):
    shutil.copytree(folder, destination)
    (destination / "chat_template.jinja").unlink(missing_ok=True)
    raw = json.loads((destination / "tokenizer_config.json").read_text())
    raw.pop("chat_template", None)
    (destination / "tokenizer_config.json").write_text(json.dumps(raw))
    return destination


def put_template(folder, place, template):
    if place == "chat_template.jinja":
        (folder / place).write_text(template)
    elif place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": template}))
    else:
        raw = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(raw | {"chat_template": template}))


PLACES = ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]


@pytest.mark.parametrize("place", PLACES)
def test_template_in_each_place(folder, builder, config, tmp_path, place):
    destination = copy_without_template(folder, tmp_path / "copy")
    put_template(destination, place, TEMPLATE)
    assert PromptBuilder(destination, config).build("x", [(1, 4, 4)]) == builder.build("x", [(1, 4, 4)])


@pytest.mark.parametrize(("winner", "loser"), [(PLACES[0], PLACES[1]), (PLACES[0], PLACES[2]), (PLACES[1], PLACES[2])])
def test_template_of_the_processor_wins(folder, tmp_path, winner, loser):
    destination = copy_without_template(folder, tmp_path / "copy")
    put_template(destination, winner, "winner")
    put_template(destination, loser, "loser")
    assert load_tokenizer(destination).chat_template == "winner"


def test_checkpoint_without_template_or_tokenizer(folder, tmp_path):
    destination = copy_without_template(folder, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="no chat template"):
        load_tokenizer(destination)
    (destination / "chat_template.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"chat_template\.json cannot be read"):
        load_tokenizer(destination)
    (destination / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load_tokenizer(destination)
    (destination / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(destination)


def test_template_that_loses_an_image_is_noticed(folder, config, tmp_path):
    destination = copy_without_template(folder, tmp_path / "copy")
    put_template(destination, "chat_template.jinja", "{{ messages[0].role }}")
    with pytest.raises(PromptError, match="made 0 image tokens of 1 images"):
        PromptBuilder(destination, config).build("x", [(1, 4, 4)])


def test_template_that_refuses(folder, config, tmp_path):
    destination = copy_without_template(folder, tmp_path / "copy")
    put_template(destination, "chat_template.jinja", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="roles must alternate"):
        PromptBuilder(destination, config).build("x")


def test_tokenizer_of_another_model(folder, config):
    other = Qwen2VLConfig(config.vision, config.text, 999, config.video_token_id, config.vision_start_token_id, None)
    with pytest.raises(CheckpointError, match="lacks the image token 999"):
        PromptBuilder(folder, other)
