"""Requests in every form that users know: what is read, what is refused by name, and that nothing is dropped."""

import base64
from types import MappingProxyType

import numpy as np
import pytest

from qwen2vl_trt import messages
from qwen2vl_trt.errors import MediaError, PromptError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.messages import ROLES, extract_media, to_messages, to_tools
from tests.support.chat import IMAGE, VIDEO, text, user

PNG = base64.b64encode(b"\x89PNG bytes").decode()


def image(height, width):
    return np.full((height, width, 3), 128, dtype=np.uint8)


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
        ([{"role": "user", "content": "see <image>, <video>"}], 0, 0, user(text("see <image>, <video>"))),
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
    ("part", "expected"),
    [
        (text("a"), text("a")),
        ({"text": "a"}, text("a")),
        ({"text": "a", "image": None}, text("a")),
        ({"type": "input_text", "text": "a"}, text("a")),
        ({"type": "output_text", "text": "a", "annotations": [], "logprobs": None}, text("a")),
        ({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, text("a")),
        ({"type": "image", "image": "a.png"}, IMAGE),
        ({"image": "a.png"}, IMAGE),
        ({"image_url": {"url": "a.png"}}, IMAGE),
        ({"type": "image_url", "image_url": "a.png", "uuid": "1"}, IMAGE),
        ({"type": "input_image", "image_url": "a.png", "detail": "auto"}, IMAGE),
        ({"type": "image", "path": "a.png"}, IMAGE),
        ({"type": "image", "url": "a.png"}, IMAGE),
        ({"type": "video", "video": "a.mp4"}, VIDEO),
        ({"video": "a.mp4"}, VIDEO),
        ({"video_url": "a.mp4"}, VIDEO),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, VIDEO),
    ],
)
def test_parts_of_every_kind(part, expected):
    kind = expected["type"]
    assert to_messages(user(part), kind == "image", kind == "video") == user(expected)
    media = extract_media(user(part))
    assert (media.images, media.videos) == (["a.png"] * (kind == "image"), ["a.mp4"] * (kind == "video"))


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (
            {"type": "image", "image": "a", "min_pixels": 3136, "max_pixels": 6272},
            ImageOptions(min_pixels=3136, max_pixels=6272),
        ),
        (
            {"image": "a", "resized_height": 56, "resized_width": 84},
            ImageOptions(resized_height=56, resized_width=84),
        ),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}, ImageOptions(max_pixels=256 * 28 * 28)),
        ({"type": "input_image", "image_url": "a", "detail": "low"}, ImageOptions(max_pixels=256 * 28 * 28)),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "high"}}, ImageOptions()),
        ({"type": "image_url", "image_url": {"url": "a", "detail": None}, "max_pixels": None}, ImageOptions()),
        (
            {"type": "video", "video": "a", "fps": 1.5, "min_frames": 4, "max_frames": 8, "total_pixels": 10**6},
            VideoOptions(fps=1.5, min_frames=4, max_frames=8, total_pixels=10**6),
        ),
        (
            {"video": "a", "nframes": 6, "video_start": 0.5, "video_end": 2, "max_pixels": 6272},
            VideoOptions(nframes=6, video_start=0.5, video_end=2, max_pixels=6272),
        ),
        ({"type": "video", "video": ["a", "b"], "sample_fps": 2.0}, VideoOptions(sample_fps=2.0)),
        ({"type": "video_url", "video_url": {"url": "a"}, "fps": 3}, VideoOptions(fps=3)),
    ],
)
def test_what_a_part_says_about_its_own_medium(part, options):
    media = extract_media(user(IMAGE, VIDEO, part), ["first"], ["first"])
    assert media.image_options + media.video_options == (
        [ImageOptions(), options, VideoOptions()]
        if type(options) is ImageOptions
        else [ImageOptions(), VideoOptions(), options]
    )


def test_media_come_in_order_from_parts_and_from_beside():
    pixels, frames = image(2, 2), [image(2, 2)]
    messages = [
        {"role": "user", "content": [IMAGE, text("first")]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": pixels},
                {"type": "image", "max_pixels": 3136},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
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
    assert media.images[2:] == ["y.png", b"\x89PNG bytes", "b.png", "/tmp/a b.png"]
    assert [options.max_pixels for options in media.image_options] == [None, None, 3136, None, None, None]
    assert media.videos[0][0] is frames[0]
    assert media.videos[1:] == ["v.mp4"]
    assert [options.fps for options in media.video_options] == [2.0, None]
    assert len(to_messages(messages, len(media.images), len(media.videos))) == 2


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///tmp/a.png", "/tmp/a.png"),
        ("FILE:///tmp/a.png", "/tmp/a.png"),
        ("file://localhost/tmp/a.png", "/tmp/a.png"),
        ("file://images/a.png", "images/a.png"),  # as qwen-vl-utils reads it
        ("file:///tmp/a%231%3F.png", "/tmp/a#1?.png"),
        ("file:///tmp/a#1?.png", "/tmp/a#1?.png"),
        (f"data:image/png;base64,{PNG}", b"\x89PNG bytes"),
        (f"DATA:image/png;charset=x;BASE64,{PNG[:4]}\n {PNG[4:]}", b"\x89PNG bytes"),
        (f"data:image;base64,{PNG.rstrip('=')}", b"\x89PNG bytes"),
        (f"data:;base64,{PNG.replace('=', '%3D')}", b"\x89PNG bytes"),
        ("data:image/svg+xml,%3Csvg%20a%3D%221%22%2F%3E", b'<svg a="1"/>'),
        ("data:,a,b", b"a,b"),
        (["file:///a.png", "b.png", f"data:;base64,{PNG}"], ["/a.png", "b.png", b"\x89PNG bytes"]),
        (f"data:video/jpeg;base64,{PNG},{PNG}", [b"\x89PNG bytes"] * 2),
        (f"data:video/png;base64,{PNG},{PNG}", [b"\x89PNG bytes"] * 2),
        (f"data:video/mp4;base64,{PNG}", b"\x89PNG bytes"),
        ("\udcff.png", "\udcff.png"),  # Python's spelling of a file name that is no UTF-8
    ],
)
def test_urls(url, expected):
    assert extract_media(user({"type": "video", "video": url})).videos == [expected]


def test_tool_calls_have_their_arguments_as_objects():
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
    bare = {"function": {"name": "look", "arguments": {"at": [1, 2]}}}
    messages = to_messages(
        [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call, bare]},
            {"role": "tool", "tool_call_id": "call_1", "content": [text("a cat")]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "end", "arguments": ""}}]},
            {"role": "assistant", "content": "Done.", "tool_calls": []},
        ]
    )
    assert messages[1]["content"] == [text("")]
    assert messages[1]["tool_calls"] == [
        {**call, "function": {"name": "look", "arguments": {"at": "é"}}},
        {**bare, "type": "function"},
    ]
    assert messages[2] == {"role": "tool", "content": [text("a cat")], "tool_call_id": "call_1"}
    assert messages[3]["tool_calls"][0]["function"] == {"name": "end", "arguments": {}}
    assert messages[4] == {"role": "assistant", "content": [text("Done.")]}


FUNCTION = {"name": "look", "description": "Look.", "parameters": {"type": "object"}, "strict": True}


def test_tools_are_as_given_with_their_type():
    end = {"name": "end"}
    assert to_tools([{"function": FUNCTION}, {"type": "function", "function": end}]) == [
        {"type": "function", "function": FUNCTION},
        {"type": "function", "function": end},
    ]
    assert to_tools([{"type": None, "function": end}]) == [{"type": "function", "function": end}]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("look", "tools is 'look', not a list"),
        ([FUNCTION], "tool 1 is not of the form"),
        ([{"function": FUNCTION}, {"function": {"name": ""}}], "tool 2 is not of the form"),
        ([{"function": FUNCTION}] * 2, "tool 2 has the name of another, 'look'"),
        ([{"function": FUNCTION, "type": "code"}], "tool 1 has the unknown type 'code'"),
        ([{"function": FUNCTION, "colour": 1}], "tool 1 has the unknown key 'colour'"),
        ([{"function": FUNCTION | {"description": 1}}], "tool 1: the description is 1"),
        ([{"function": FUNCTION | {"parameters": []}}], "tool 1: the parameters are"),
        ([{"function": FUNCTION | {"parameters": {"type": "array"}}}], "tool 1: the parameters are"),
        ([{"function": FUNCTION | {"description": "\ud800"}}], "tool 1: character .* lone surrogate"),
        ([{"function": FUNCTION | {"parameters": {1, 2}}}], "tool 1 is no JSON"),
    ],
)
def test_wrong_tools(tools, message):
    with pytest.raises(PromptError, match=message):
        to_tools(tools)


def test_every_role_is_kept():
    assert [message["role"] for message in to_messages([{"role": role, "content": "x"} for role in ROLES])] == list(
        ROLES
    )


def test_an_item_of_openais_responses_is_a_message():
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
    assert to_messages([item]) == user(text("x"))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}],
        [{"role": "system", "content": ""}, {"role": "user", "content": " "}],
        [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": []}],
        [{"role": "system", "content": "Be brief."}],
    ],
)
def test_an_empty_text_in_a_conversation(messages):
    assert [message["role"] for message in to_messages(messages)] == [message["role"] for message in messages]


def calls(*given):
    return [{"role": "assistant", "content": "x", "tool_calls": list(given)}]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return {"a": value}


SURROGATE = r"character 2 of the text is '\\ud800', a lone surrogate"
BAD = [
    ("<image> <image>", 1, 0, "places for images .*<image>.*: 2; images given: 1"),
    ("<image>", 2, 0, "places for images .*: 1; images given: 2"),
    ("a literal <image>", 0, 0, "places for images .*: 1; images given: 0"),
    ("<video>", 0, 0, "places for videos .*: 1; videos given: 0"),
    ("<image> What?", 1, 1, "places for videos .*: 0; videos given: 1"),
    ("<video> What?", 1, 1, "places for images .*: 0; images given: 1"),
    (user(text("What?")), 1, 0, r"places for images in the prompt \(parts of type image\): 0; images given: 1"),
    ([{"role": "user", "content": "<image>"}], 1, 0, r"\(parts of type image\): 0; images given: 1"),
    (user(IMAGE, VIDEO), 1, 0, "places for videos .*: 1; videos given: 0"),
    ("", 0, 0, "empty"),
    (" \n\t", 0, 0, "empty"),
    ([], 0, 0, "empty: it has no messages"),
    (user(), 0, 0, "empty"),
    (user(text("  ")), 0, 0, "empty"),
    ([{"role": "user", "content": ""}], 0, 0, "empty"),
    # Messages
    ([{"role": "robot", "content": "x"}], 0, 0, "unknown role 'robot'; known are system, developer, "),
    ([{"role": "\ud800", "content": "x"}], 0, 0, r"unknown role '\\ud800'"),
    ([{"role": np.arange(2), "content": "x"}], 0, 0, "unknown role array"),
    ([{"role": "x" * 10**6, "content": "x"}], 0, 0, r"^.{1,150}$"),
    ([{"role": None, "content": "x"}], 0, 0, "unknown role None"),
    ([{"content": "x"}], 0, 0, "message 1 is not a dictionary with 'role' and 'content'"),
    (["x"], 0, 0, "message 1 is not a dictionary"),
    ([{"role": "user", "content": 3}], 0, 0, "content is a string or a list of parts, not 3"),
    ([{"role": "user", "content": b"x"}], 0, 0, "content is a string or a list of parts, not b'x'"),
    ([{"role": "user"}], 0, 0, "content is a string or a list of parts, not None"),
    ([{"role": "tool", "content": None}], 0, 0, "content is a string or a list of parts, not None"),
    ([*user(text("x")), {"role": "user", "content": "x", "fps": 2}], 0, 0,
     "message 2 has the unknown key 'fps'; known are role, content, name"),
    ([{"role": "user", "content": "x", "tool_calls": [1]}], 0, 0, "message 1 has the unknown key 'tool_calls'"),
    ([{"role": "assistant", "content": "x", "function_call": {"name": "f"}}], 0, 0, "unknown key 'function_call'"),
    ([{"role": "assistant", "content": "x", "prefix": True}], 0, 0, "unknown key 'prefix'"),
    ([{"role": "user", "content": "x", "name": 5}], 0, 0, "message 1: name is 5, not a string"),
    ([{"role": "user", "content": "x", "y" * 10**6: 1}], 0, 0, r"^.{1,150}$"),
    (3, 0, 0, "a string or a list of messages, not int"),
    (None, 0, 0, "a string or a list of messages, not NoneType"),
    ({"role": "user", "content": "x"}, 0, 0, "a string or a list of messages, not dict"),
    (b"What?", 0, 0, "a string or a list of messages, not bytes"),
    # Parts
    (user({"type": "audio"}), 0, 0, "message 1, part 1 has the unknown type 'audio'; known are text, input_text, "),
    (user({"type": ["text"], "text": "x"}), 0, 0, r"unknown type \['text'\]"),
    (user({"type": "image_embeds", "image_embeds": "x"}), 0, 0, "unknown type 'image_embeds'"),
    (user("x"), 0, 0, "message 1, part 1 is 'x', not a dictionary"),
    (user(text("x"), {}), 0, 0, "message 1, part 2 has neither 'type' nor any of 'text', 'image', "),
    (user({"type": "text"}), 0, 0, "text part without 'text'"),
    (user({"type": "text", "text": ["x"]}), 0, 0, "text part without 'text'"),
    (user({"type": "image", "image": "a", "image_url": "b"}), 1, 0, "has both 'image' and 'image_url'; give one"),
    (user({"image": "a", "video": "b"}), 1, 0, "has both 'image' and 'video'; give one"),
    (user({"image": "a", "text": "b"}), 1, 0, "has both 'text' and 'image'; give one"),
    (user({"type": "text", "text": "a", "image": "b"}), 0, 0, "part 1 has the unknown key 'image'; known are type"),
    (user({"type": "image", "image": "a", "video": "b"}), 1, 0, "unknown key 'video'; known are type, image, "),
    (user({"type": "image", "image": "a", "fps": 2}), 1, 0, "unknown key 'fps'; .*min_pixels, max_pixels"),
    (user({"type": "image", "image": "a", "max_pixel": 9}), 1, 0, "unknown key 'max_pixel'"),
    (user({"type": "video", "video": "a", "num_frames": 9}), 0, 1, "unknown key 'num_frames'; .* nframes, "),
    (user({"type": "text", "text": "a", "max_pixels": 9}), 0, 0, "unknown key 'max_pixels'"),
    (user({"type": "input_image", "file_id": "f"}), 1, 0, "unknown key 'file_id'"),
    (user({"type": "image", "image": "a", 5: 2}), 1, 0, "unknown key 5"),
    (user({"type": "image_url", "image_url": {"url": "a", "size": 9}}), 1, 0,
     "part 1, image_url has the unknown key 'size'; known are url, detail"),
    (user({"type": "video_url", "video_url": {"url": "a", "detail": "low"}}), 0, 1, "unknown key 'detail'"),
    (user({"type": "video", "video": "a", "detail": "low"}), 0, 1, "unknown key 'detail'"),
    (user({"type": "image_url", "image_url": {}}), 1, 0, "'image_url' has no 'url'"),
    (user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}, "detail": "high"}), 1, 0, "detail' twice"),
    (user({"type": "image_url", "image_url": {"url": "a", "detail": "tiny"}}), 1, 0, "detail is 'tiny'; known are"),
    (user({"type": "image_url", "image_url": {"url": "a", "detail": np.arange(2)}}), 1, 0, "detail is array"),
    (user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}, "max_pixels": 9}), 1, 0,
     "has both 'detail': 'low' and 'max_pixels'"),
    # Tool calls
    (calls("x"), 0, 0, "message 1, tool call 1 is not of the form"),
    (calls({"function": {"arguments": "{}"}}), 0, 0, "tool call 1 is not of the form"),
    (calls({"function": {"name": "f", "arguments": "{"}}), 0, 0, "tool call 1 is no JSON"),
    (calls({"function": {"name": "f", "arguments": "[1]"}}), 0, 0, r"arguments are \[1\], not an object"),
    (calls({"function": {"name": "f", "arguments": 0}}), 0, 0, "arguments are 0, not an object"),
    (calls({"function": {"name": "f", "arguments": {"a": {1}}}}), 0, 0, "tool call 1 is no JSON: .*set"),
    (calls({"function": {"name": "f", "arguments": nested(100_000)}}), 0, 0, "tool call 1 is no JSON: .*recursion"),
    (calls({"function": {"name": "f", "arguments": '{"a": ' + "[" * 200_000}}), 0, 0, "tool call 1 is no JSON"),
    (calls({"function": {"name": "f", "strict": True}}), 0, 0, "tool call 1, function has the unknown key 'strict'"),
    (calls({"index": 1, "function": {"name": "f"}}), 0, 0, "tool call 1 has the unknown key 'index'"),
    (calls({"type": "code", "function": {"name": "f"}}), 0, 0, "tool call 1 has the unknown type 'code'"),
    ([{"role": "assistant", "content": "x", "tool_calls": "f()"}], 0, 0, r"tool_calls is 'f\(\)', not a list"),
    # Lone surrogates
    ("a\ud800", 0, 0, f"^the prompt: {SURROGATE}"),
    ([{"role": "user", "content": "a\ud800"}], 0, 0, f"message 1: {SURROGATE}"),
    (user(IMAGE, text("a\ud800")), 1, 0, f"message 1, part 2: {SURROGATE}"),
    ([{"role": "user", "content": "x", "name": "a\ud800"}], 0, 0, f"message 1, name: {SURROGATE}"),
    ([{"role": "tool", "content": "x", "tool_call_id": "a\ud800"}], 0, 0, f"tool_call_id: {SURROGATE}"),
    (calls({"function": {"name": "a\ud800", "arguments": "{}"}}), 0, 0, r"tool call 1: .*'\\ud800', a lone surrogate"),
    (calls({"function": {"name": "a", "arguments": '{"\\ud800": 1}'}}), 0, 0, r"tool call 1: .*a lone surrogate"),
    (user({"type": "text", "text": "a", "\ud800": 1}), 0, 0, r"unknown key '\\ud800'"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "images", "videos", "message"), BAD)
def test_bad_prompts_are_refused_by_name(prompt, images, videos, message):
    with pytest.raises(PromptError, match=message) as caught:
        to_messages(prompt, images, videos)
    str(caught.value).encode()  # can be printed and sent
    assert len(str(caught.value)) < 500


def test_a_wrong_value_names_its_part(monkeypatch):
    def refuse(**options):
        raise MediaError(f"these are refused: {options}")

    monkeypatch.setitem(messages._OPTIONS, "image", refuse)
    with pytest.raises(PromptError, match=r"message 1, part 2: these are refused: \{'min_pixels': 'many'\}"):
        extract_media(user(text("x"), {"type": "image", "image": "a.png", "min_pixels": "many"}))


def test_lists_in_lists_are_left_to_whoever_loads_them():
    deep = nested(100_000)["a"]
    assert extract_media(user({"type": "video", "video": [deep]})).videos[0][0] is deep


def test_any_mapping_is_a_message():
    assert to_messages([MappingProxyType({"role": "user", "content": (MappingProxyType(text("x")),)})]) == user(
        text("x")
    )


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        (user(IMAGE, IMAGE), ["a"], r"leave open \(parts of type image\): 2; images given: 1"),
        (user({"type": "image", "image": "b"}), ["a"], "leave open .*: 0; images given: 1"),
        ([{"role": "user", "content": "<image>"}], ["a"], "leave open .*: 0; images given: 1"),
        (
            user(IMAGE, {"type": "image", "image": "https://example.org/a.png"}),
            ["a"],
            "message 1, part 2: .* is remote",
        ),
        (user({"type": "image", "image": "HTTP://example.org/" + "a" * 10**6}), [], "^.{1,150}$"),
        (user({"type": "video", "video": ["a", "https://example.org/b"]}), [], "is remote"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,???"}}), [], "part 1: .* not base64"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,%FF"}}), [], "not base64"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png,\ud800"}}), [], "part 1: .* not valid text"),
        (user({"video": "data:video/webp;base64,QQ==,QQ=="}), [], "'video/webp' is a list; only video/jpeg and"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,é"}}), [], "not base64"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}), [], "has no comma"),
        (user({"type": "audio"}), [], "unknown type 'audio'"),
    ],
)
def test_bad_media_are_refused_by_name(messages, images, message):
    with pytest.raises(PromptError, match=message):
        extract_media(messages, images)
