"""JSON schemas of OpenAI's and Qwen's messages, as :mod:`qwen2vl_trt.messages` reads them, for the OpenAPI document."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from qwen2vl_trt.media_options import ImageOptions, VideoOptions

_REF = "#/components/schemas/{}"
_URL = {"type": "string", "description": "data:, and what --allowed-media-domains and --allowed-local-media-path allow"}
_FRAMES = {"type": "array", "items": _URL, "minItems": 1, "description": "the frames of a video"}
_TEXT = {"type": ["string", "null"]}
_DETAIL = {"enum": ["auto", "high", "low", None]}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _one_of_types(*names: str) -> dict[str, Any]:
    return {"enum": [*names, None], "description": "by default that of the key beside it"}


def _options(kind: type[ImageOptions]) -> dict[str, Any]:
    """Of an image or a video."""
    whole, real = {"type": ["integer", "null"], "minimum": 1}, {"type": ["number", "null"], "minimum": 0}
    return {each.name: whole if str(each.type).startswith("int") else real for each in fields(kind)}


def _media(name: str, url: dict[str, Any], **inner: Any) -> dict[str, Any]:
    """The keys of which a part of an image or a video has one."""
    given = {"anyOf": [url, _object(["url"], url=url, **inner), {"type": "null"}]}
    return dict.fromkeys((name, f"{name}_url", "url", "path"), given)


_CALL = _object(
    ["function"],
    id={},
    type={"enum": ["function", None]},
    function=_object(
        ["name"],
        name={"type": "string", "minLength": 1},
        arguments={"type": ["string", "object", "null"], "description": "an object of JSON, or its text"},
    ),
)


def _message(*roles: str, content: dict[str, Any], required: list[str], **properties: Any) -> dict[str, Any]:
    return _object(required, role={"enum": list(roles)}, name=_TEXT, content=content, **properties)


_CONTENT: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "array", "items": {"$ref": _REF.format("ContentPart")}},
]
_GIVEN: dict[str, Any] = {"content": {"anyOf": _CONTENT}, "required": ["role", "content"]}

SCHEMAS: dict[str, dict[str, Any]] = {
    "Message": {
        "anyOf": [
            _message("system", "developer", "user", **_GIVEN),
            _message(
                "assistant",
                content={"anyOf": [*_CONTENT, {"type": "null"}]},
                required=["role"],
                tool_calls={"type": ["array", "null"], "items": _CALL},
                reasoning_content=_TEXT,
            ),
            _message("tool", **_GIVEN, tool_call_id=_TEXT),
        ]
    },
    "ContentPart": {"anyOf": [{"$ref": _REF.format(name)} for name in ("TextPart", "ImagePart", "VideoPart")]},
    "TextPart": _object(["text"], type=_one_of_types("text", "input_text", "output_text"), text={"type": "string"}),
    "ImagePart": _object(
        [],
        type=_one_of_types("image", "image_url", "input_image"),
        detail=_DETAIL,
        **_media("image", _URL, detail=_DETAIL),
        **_options(ImageOptions),
    ),
    "VideoPart": _object(
        [],
        type=_one_of_types("video", "video_url"),
        **_media("video", {"anyOf": [_URL, _FRAMES]}),
        **_options(VideoOptions),
    ),
}
