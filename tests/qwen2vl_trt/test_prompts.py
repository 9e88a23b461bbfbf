"""Prompts against Transformers' processor, on a small byte-level tokenizer with Qwen's special tokens."""

import base64
import json
import shutil

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import CheckpointError, PromptError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.prompts import PromptBuilder, extract_media, load_tokenizer, to_messages
from tests.support.models import MINIMAL_CONFIG

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# ChatML with Qwen's vision tokens and default system message; content is a string or a list of parts.
TEMPLATE = """
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def config():
    fields = {f"{name}_token_id": 256 + SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    fields |= {f"{name}_token_id": 256 + SPECIAL.index(f"<|{name}_pad|>") for name in ("image", "video")}
    return Qwen2VLConfig.from_dict(MINIMAL_CONFIG | fields | {"vocab_size": 264})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


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


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


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


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "expected"),
    [
        ("What?", 0, 0, user(text("What?"))),
        ("What?", 2, 0, user(IMAGE, IMAGE, text("What?"))),
        ("What?", 1, 2, user(IMAGE, VIDEO, VIDEO, text("What?"))),
        ("", 1, 0, user(IMAGE)),
        ("<image>What?", 1, 0, user(IMAGE, text("What?"))),
        ("a <image>\nb<video> c", 1, 1, user(text("a "), IMAGE, text("\nb"), VIDEO, text(" c"))),
        ("<image><image>", 2, 0, user(IMAGE, IMAGE)),
        ("< image> <images> <Image>", 0, 0, user(text("< image> <images> <Image>"))),
        ([{"role": "user", "content": "see <image>"}], 1, 0, user(text("see "), IMAGE)),
        (user(text("a literal <image>"), IMAGE), 1, 0, user(text("a literal <image>"), IMAGE)),
        (user({"type": "image_url", "image_url": {"url": "a.png"}}), 1, 0, user(IMAGE)),
        (
            [{"role": "system", "content": "<image> is a word"}, {"role": "user", "content": "x"}],
            0,
            0,
            [{"role": "system", "content": [text("<image> is a word")]}, *user(text("x"))],
        ),
    ],
)
def test_media_go_to_their_places_or_first(prompt, images, videos, expected):
    assert to_messages(prompt, images, videos) == expected


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "message"),
    [
        ("<image> <image>", 1, 0, "places for images .*: 2; images given: 1"),
        ("<image>", 2, 0, "places for images .*: 1; images given: 2"),
        ("a literal <image>", 0, 0, "places for images .*: 1; images given: 0"),
        ("<video>", 0, 0, "places for videos .*: 1; videos given: 0"),
        ("<image> What?", 1, 1, "places for videos .*: 0; videos given: 1"),
        ("<video> What?", 1, 1, "places for images .*: 0; images given: 1"),
        (user(text("What?")), 1, 0, "places for images .*: 0; images given: 1"),
        (user(IMAGE, VIDEO), 1, 0, "places for videos .*: 1; videos given: 0"),
        ("", 0, 0, "empty"),
        (" \n\t", 0, 0, "empty"),
        ([], 0, 0, "empty"),
        (user(), 0, 0, "empty"),
        (user(text("  ")), 0, 0, "empty"),
        ([{"role": "robot", "content": "x"}], 0, 0, "unknown role 'robot'; known are system, user, assistant"),
        (user({"type": "audio"}), 0, 0, "unknown type 'audio'; known are text, image, image_url, video"),
        (user({"text": "x"}), 0, 0, "unknown type None"),
        (user("x"), 0, 0, "unknown type None"),
        (user({"type": "text"}), 0, 0, "text part without 'text'"),
        ([{"content": "x"}], 0, 0, "message 1 is not a dictionary with 'role' and 'content'"),
        (["x"], 0, 0, "message 1 is not a dictionary"),
        ([{"role": "user", "content": 3}], 0, 0, "content is a string or a list of parts, not 3"),
        (3, 0, 0, "a string or a list of messages, not int"),
        (None, 0, 0, "a string or a list of messages, not NoneType"),
    ],
)
def test_bad_prompts_are_refused_by_name(builder, prompt, images, videos, message):
    with pytest.raises(PromptError, match=message):
        builder.build(prompt, [(1, 4, 4)] * images, [(1, 4, 4)] * videos)


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


def test_media_come_in_order_from_parts_and_from_beside(tmp_path):
    pixels, frames = image(2, 2), [image(2, 2)]
    data = "data:image/png;base64," + base64.b64encode(b"png").decode()
    messages = [
        {"role": "user", "content": "first <image>"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": pixels},
                {"type": "image"},
                {"type": "image_url", "image_url": {"url": data}},
                {"type": "image_url", "image_url": "b.png"},
                {"type": "image", "image": "file:///tmp/a%20b.png"},
                {"type": "video", "video": frames, "fps": 2.0},
                {"type": "video"},
                {"type": "text", "text": "?"},
            ],
        },
    ]
    media = extract_media(messages, images=["x.png", "y.png"], videos=["v.mp4"])
    assert media.images[0] == "x.png"
    assert media.images[1] is pixels
    assert media.images[2:] == ["y.png", b"png", "b.png", "/tmp/a b.png"]
    assert media.videos[0] is frames
    assert media.videos[1:] == ["v.mp4"]
    assert media.image_options == [ImageOptions()] * 6
    assert media.video_options == [VideoOptions(fps=2.0), VideoOptions()]
    assert len(to_messages(messages, len(media.images), len(media.videos))) == 2


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        (user(IMAGE, IMAGE), ["a"], "the messages leave open .*: 2; images given: 1"),
        (user({"type": "image", "image": "b"}), ["a"], "the messages leave open .*: 0; images given: 1"),
        (user({"type": "image", "image": "https://example.org/a.png"}), [], "remote"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}), [], "not base64"),
        (user({"type": "image_url", "image_url": {"url": "data:text/plain,hello"}}), [], "not base64"),
        (user({"type": "audio"}), [], "unknown type 'audio'"),
    ],
)
def test_bad_media_are_refused_by_name(messages, images, message):
    with pytest.raises(PromptError, match=message):
        extract_media(messages, images)
