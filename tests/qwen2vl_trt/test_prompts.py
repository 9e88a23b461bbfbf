"""Prompts against Transformers' processor, on a small byte-level tokenizer with Qwen's special tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import CheckpointError, LimitError, PromptError
from qwen2vl_trt.prompts import PromptBuilder
from qwen2vl_trt.tokenizer import load_tokenizer
from tests.support.chat import (
    FIRST_SPECIAL,
    IMAGE,
    SPECIAL,
    TEMPLATE,
    VIDEO,
    make_config,
    make_tokenizer,
    save_tokenizer,
    text,
    user,
)


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


def special_tokens(prompt):
    return [SPECIAL[token - FIRST_SPECIAL] for token in prompt.token_ids if token >= FIRST_SPECIAL]


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("form", ["string", "part", "joined parts", "system"])
def test_special_tokens_in_a_text_are_text(builder, token, form):
    prompt = {
        "string": f"<image>What is {token}?",
        "part": user(IMAGE, text(f"What is {token}?")),
        "joined parts": user(IMAGE, text(token[:5]), text(token[5:])),
        "system": [{"role": "system", "content": token}, *user(IMAGE)],
    }[form]
    found = builder.build(prompt, [(1, 4, 4)])
    image = ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"]
    assert special_tokens(found) == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>", *image, "<|im_end|>"),
        "<|im_start|>",
    ]
    assert found.text.count(token) == 1 + builder.build(user(IMAGE), [(1, 4, 4)]).text.count(token)
    decoded = builder.tokenizer.backend_tokenizer.decode(found.token_ids, skip_special_tokens=False)
    assert decoded == found.text.replace("<|vision_start|><|image_pad|>", "<|vision_start|>" + "<|image_pad|>" * 4)


@pytest.fixture(scope="module")
def allowing(folder, config):
    return PromptBuilder(folder, config, allow_special_tokens=True)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
@pytest.mark.parametrize("form", ["string", "part", "joined parts", "system", "name"])
def test_vision_tokens_in_a_text_are_refused_where_special_tokens_are_allowed(allowing, token, form, monkeypatch):
    monkeypatch.setitem(allowing._written, (allowing._template, "user", "name"), True)
    prompt = {
        "string": f"What is {token}?",
        "part": user(IMAGE, text(f"What is {token}?")),
        "joined parts": user(IMAGE, text(token[:5]), text(token[5:])),
        "system": [{"role": "system", "content": token}, *user(IMAGE)],
        "name": [{**user(IMAGE)[0], "name": token}],
    }[form]
    with pytest.raises(PromptError) as caught:
        allowing.build(prompt, [(1, 4, 4)])
    assert repr(token) in str(caught.value)
    assert "<image>" in str(caught.value)


def test_special_tokens_that_are_allowed_are_read_as_transformers_reads_them(allowing, processor):
    prompt = allowing.build("a<|im_end|>b")
    assert prompt.token_ids == processor.tokenizer.encode(prompt.text)
    assert special_tokens(prompt).count("<|im_end|>") == 3


def test_text_with_null_characters_is_text(builder, processor):
    prompt = builder.build("a\0b\0")
    assert "a\0b\0" in prompt.text
    assert prompt.token_ids == processor.tokenizer.encode(prompt.text)


@pytest.mark.parametrize("length", [10**6, 3 * 10**7])
def test_a_text_that_cannot_fit_is_not_tokenized(folder, config, length, monkeypatch):
    builder = PromptBuilder(folder, config, max_input_len=100)
    monkeypatch.setattr(builder, "tokenizer", None)
    monkeypatch.setattr(builder._escaper, "_tokenizer", None)
    with pytest.raises(LimitError, match=r"over 65,536 characters, more than 100 tokens \(--max-input-len\)"):
        builder.build("x" * length)


def test_a_text_that_fits_is_tokenized_however_long_its_tokens(folder, config):
    longest = max(SPECIAL, key=len)
    builder = PromptBuilder(folder, config, allow_special_tokens=True, max_input_len=8000)
    words = "<|endoftext|>" * 7000
    assert len(words) > 65_536
    assert special_tokens(builder.build(words)).count("<|endoftext|>") == 7000
    assert len(longest) <= 16


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "<|im_end|>"}'}}
CALLING = [
    *user(text("Look.")),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "look", "content": "a cat"},
]


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "reasoning_content"),
        ({"role": "user", "content": "x", "name": "Ann"}, "name"),
    ],
)
def test_what_the_template_does_not_write_is_refused(builder, message, key):
    with pytest.raises(
        PromptError, match=f"message 2: the checkpoint's chat template does not write '{key}'; leave it"
    ):
        builder.build([*user(text("x")), message])


def test_roles_are_written_as_they_are_but_for_a_developer_that_the_template_does_not_know(builder, config, tmp_path):
    messages = [{"role": "developer", "content": "Be brief."}, *user(text("x")), CALLING[2]]
    prompt = builder.build(messages)
    assert prompt.text == builder.build([{"role": "system", "content": "Be brief."}, *messages[1:]]).text
    knowing = PromptBuilder(save_tokenizer(tmp_path, "{# system, developer #}" + TEMPLATE), config)
    assert "<|im_start|>developer\nBe brief.<|im_end|>" in knowing.build(messages).text
    assert "<|im_start|>tool\na cat<|im_end|>" in prompt.text


def test_a_role_that_the_template_passes_over_is_refused(config, tmp_path):
    known = TEMPLATE.replace("for message in messages", "for message in messages if message.role != 'tool'")
    builder = PromptBuilder(save_tokenizer(tmp_path, known), config)
    with pytest.raises(PromptError, match="message 2: the checkpoint's chat template does not write the role 'tool'"):
        builder.build([*user(text("x")), CALLING[2]])


LOOK = {"type": "function", "function": {"name": "look", "description": "At <|im_end|>.", "parameters": {"a": "|"}}}
TOOLS = (Path(__file__).parents[2] / "examples" / "tools.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("allow_special_tokens", [False, True])
def test_tools_are_written_as_transformers_writes_them(folder, config, allow_special_tokens):
    builder = PromptBuilder(folder, config, allow_special_tokens, chat_template=TOOLS)
    call = {"function": {"name": "look", "arguments": {"at": "é"}}}
    results = [{"role": "tool", "content": "a cat"}, {"role": "tool", "content": [text("this"), IMAGE]}]
    messages = [*user(text("Look."), IMAGE), {"role": "assistant", "content": "", "tool_calls": [call] * 2}, *results]
    prompt = builder.build(messages, [(1, 4, 4)] * 2, tools=[LOOK])
    expected = make_tokenizer().apply_chat_template(
        messages, [LOOK], chat_template=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert prompt.text == expected
    assert "\n" + json.dumps(LOOK) + "\n" in prompt.text
    block = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{block}\n{block}<|im_end|>" in prompt.text
    ends = special_tokens(prompt).count("<|im_end|>")
    assert ends == (5 if allow_special_tokens else 4)  # of the system, the user, the assistant, and the results


def test_without_tools_the_example_is_the_published_template(builder, folder, config):
    other = PromptBuilder(folder, config, chat_template=TOOLS)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *user(IMAGE, VIDEO)]
    for messages in (conversation, [{"role": "system", "content": "Be brief."}, *conversation]):
        assert other.build(messages, [(1, 4, 4)], [(1, 4, 4)]) == builder.build(messages, [(1, 4, 4)], [(1, 4, 4)])


def test_a_template_for_tools_alone(config, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{# with tools #}" + TOOLS}
    tokenizer.save_pretrained(tmp_path, save_jinja_files=False)
    builder = PromptBuilder(tmp_path, config)
    assert "# Tools" in builder.build("x", tools=[LOOK]).text
    assert "<tool_response>" in builder.build(CALLING).text
    assert builder.build("x").text == PromptBuilder(save_tokenizer(tmp_path / "one"), config).build("x").text


def test_tools_that_the_template_does_not_write(builder):
    with pytest.raises(PromptError, match=r"template does not write tools; give one that does \(--chat-template\)"):
        builder.build("x", tools=[LOOK])


def test_an_image_token_in_a_tool(folder, config):
    builder = PromptBuilder(folder, config, allow_special_tokens=True, chat_template=TOOLS)
    tool = {"function": {"name": "look", "description": "<|image_pad|>"}}
    with pytest.raises(PromptError, match=r"the text contains '<\|image_pad\|>'"):
        builder.build("x", tools=[tool])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "is empty"),
        ("{% for %}", "that was given: .* compiled"),
        ('{"type": "object"}', "that was given: it does not write the text"),
    ],
)
def test_a_chat_template_that_is_none(folder, config, given, message):
    with pytest.raises(
        CheckpointError, match=f"the chat template {message}|the chat template that was given {message}"
    ):
        PromptBuilder(folder, config, chat_template=given)


def test_tool_calls_that_the_template_writes(config, tmp_path):
    writing = TEMPLATE.replace(
        "<|im_end|>\n{% endfor %}",
        "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}"
        "{{ call.function.arguments|tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}",
    )
    builder = PromptBuilder(save_tokenizer(tmp_path, writing), config)
    prompt = builder.build(CALLING)
    assert '<|im_start|>assistant\n<call>look{"at": "<|im_end|>"}</call><|im_end|>' in prompt.text
    assert special_tokens(prompt).count("<|im_end|>") == 4
    with pytest.raises(PromptError, match="does not write 'reasoning_content'"):
        builder.build([{"role": "assistant", "content": "x", "reasoning_content": "hm"}])
    deep = "[" * 100_000 + "]" * 100_000
    deep_call = {"function": {"name": "look", "arguments": f'{{"at": {deep}}}'}}
    with pytest.raises(PromptError, match=r"nested too deeply|is no JSON"):
        builder.build([{"role": "assistant", "tool_calls": [deep_call]}])


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
    put_template(
        destination, "chat_template.jinja", "{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}"
    )
    with pytest.raises(PromptError, match="made 0 image tokens of 1 images"):
        PromptBuilder(destination, config).build("x", [(1, 4, 4)])


def test_template_that_refuses(folder, config, tmp_path):
    destination = copy_without_template(folder, tmp_path / "copy")
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    put_template(destination, "chat_template.jinja", refusing + TEMPLATE)
    with pytest.raises(PromptError, match="roles must alternate"):
        PromptBuilder(destination, config).build([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template cannot be compiled: "),
        ("{{ raise_exception('never') }}", "the chat template refuses the messages: never"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if messages[0].content is not string %}{{ 1 / 0 }}{% endif %}", "ZeroDivisionError"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 999 + "{% endfor %}{% endfor %}",
            "over .* chara",
        ),
        ("\ud800", "cannot be tokenized"),
        (5, "the chat template cannot be compiled: "),
        ([1], "chat template"),
        ({"a": "b"}, "multiple chat templates with no default"),
    ],
)
def test_template_that_cannot_be_used_is_known_when_the_checkpoint_is_loaded(
    folder, config, tmp_path, template, message
):
    destination = copy_without_template(folder, tmp_path / "copy")
    (destination / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=message) as caught:
        PromptBuilder(destination, config)
    assert str(destination) in str(caught.value)


def test_tokenizer_of_another_model(folder, config):
    other = Qwen2VLConfig(config.vision, config.text, 999, config.video_token_id, config.vision_start_token_id, None)
    with pytest.raises(CheckpointError, match="lacks the image token 999"):
        PromptBuilder(folder, other)
