"""A prompt: a string, token ids, or messages as OpenAI, Qwen or Transformers write them (docs/guide/inputs.md).

In a string ``<image>`` and ``<video>`` are placeholders; without one the images come first, then the videos, then the
text. In messages ``<image>`` is text. A key that is neither used nor ignored is an error; a value of None is no value.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from reprlib import repr as shown
from typing import Any, Literal, TypeGuard
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

from .errors import MediaError, PromptError
from .media_options import ImageOptions, VideoOptions

Message = Mapping[str, Any]
MediaKind = Literal["image", "video"]
Kind = Literal["text"] | MediaKind

ROLES = ("system", "developer", "user", "assistant", "tool")

_TYPES: dict[str, Kind] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
_CONTENT_KEYS = {
    "text": ("text",),
    "image": ("image", "image_url", "url", "path"),
    "video": ("video", "video_url", "url", "path"),
}
_UNTYPED = ("text", "image", "image_url", "video", "video_url")  # keys that tell the type of a part without one
_OPTIONS = {"image": ImageOptions, "video": VideoOptions}
_OPTION_NAMES = {kind: [one.name for one in fields(options)] for kind, options in _OPTIONS.items()}
_IGNORED = ("cache_control", "uuid")  # for caches; here media are recognised by their content
_TEMPLATE_KEYS = {  # of a message, for the chat template
    "system": ("name",),
    "developer": ("name",),
    "user": ("name",),
    "assistant": ("name", "tool_calls", "reasoning_content"),
    "tool": ("name", "tool_call_id"),
}
_LOW_DETAIL = 256 * 28 * 28  # pixels; 256 tokens
FRAME_LISTS = ("video/jpeg", "video/png")
_PLACEHOLDER = re.compile(r"<(image|video)>")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Media:
    """The images and videos of messages, in order, the options of each, and ``Request.cache_salt``."""

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    image_options: list[ImageOptions] = field(default_factory=list)
    video_options: list[VideoOptions] = field(default_factory=list)
    cache_salt: str | None = None


def is_token_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is a list of token ids, as its first item tells."""
    listed = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray))
    return listed and len(prompt) > 0 and isinstance(prompt[0], Integral)


def to_messages(prompt: str | Sequence[Message], images: int = 0, videos: int = 0) -> list[dict[str, Any]]:
    """A prompt in the form that chat templates take, without the media.

    Args:
        images: number of images, those inside the messages included; ``videos`` likewise.

    Returns:
        ``[{"role": ..., "content": [{"type": "text", "text": ...} | {"type": "image"} | {"type": "video"}]}]``, and
        what else a message has for the template (``tool_calls``).

    Raises:
        PromptError: placeholders do not match the media, the prompt is empty, or something in it is unknown or wrong.
    """
    if isinstance(prompt, str):
        parts = _split(checked_text(prompt, "the prompt"))
        if all(part.kind == "text" for part in parts):
            parts = [_Part("image")] * images + [_Part("video")] * videos + parts
        messages = [_Message("user", parts, {})]
    else:
        messages = _read(prompt)
    for kind, given in (("image", images), ("video", videos)):
        places = sum(part.kind == kind for message in messages for part in message.parts)
        if places != given:
            marks = f"<{kind}>" if isinstance(prompt, str) else f"parts of type {kind}"
            raise PromptError(f"places for {kind}s in the prompt ({marks}): {places}; {kind}s given: {given}")
    only = messages[0] if len(messages) == 1 else None
    if only and not only.fields and not any(part.kind != "text" or part.text.strip() for part in only.parts):
        raise PromptError("the prompt is empty: it has neither text nor images nor videos")
    return [
        {"role": message.role, "content": [part.for_template for part in message.parts], **message.fields}
        for message in messages
    ]


def to_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's tools for the chat template, as they are but for a ``type`` that may be left out.

    Raises:
        PromptError: they are no list, one is not of OpenAI's form, or two have one name.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise PromptError(f"tools is {shown(tools)}, not a list")
    read = [_from_json(f"tool {number}", tool, _tool) for number, tool in enumerate(tools, start=1)]
    names = [tool["function"]["name"] for tool in read]
    for number, name in enumerate(names, start=1):
        if name in names[: number - 1]:
            raise PromptError(f"tool {number} has the name of another, {shown(name)}; give each its own")
    return read


def extract_media(
    messages: Sequence[Message] | Sequence[int], images: Sequence[Any] = (), videos: Sequence[Any] = ()
) -> Media:
    """The images and videos of messages, in order; token ids have none.

    A part has its own (``{"type": "image", "image": ...}``, ``{"type": "image_url", "image_url": {"url": ...}}``,
    ``{"type": "video", "video": ..., "fps": ...}``) as a path, ``file://`` or ``data:`` URL or any object that the
    preprocessor takes; if not, it takes the next of ``images`` or ``videos``.

    Raises:
        PromptError: too few or too many media, a remote URL, or something unknown or wrong.
    """
    if is_token_ids(messages):
        if images or videos:
            raise PromptError("a prompt of token ids takes no images and videos; give a text or messages with them")
        return Media()
    pools = {"image": list(images), "video": list(videos)}
    given = {kind: len(pool) for kind, pool in pools.items()}
    empty = {"image": 0, "video": 0}
    media = Media()
    for message in _read(messages):
        for part in message.parts:
            if part.kind == "text":
                continue
            found = resolve_url(part.media, part.where)
            if found is None:
                empty[part.kind] += 1
                found = pools[part.kind].pop(0) if pools[part.kind] else None
            if part.kind == "image":
                media.images.append(found)
                media.image_options.append(part.options)
            else:
                media.videos.append(found)
                media.video_options.append(part.options)
    for kind in pools:
        if empty[kind] != given[kind]:
            raise PromptError(
                f"places for {kind}s that the messages leave open (parts of type {kind}): {empty[kind]};"
                f" {kind}s given: {given[kind]}"
            )
    return media


def detach_media(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[tuple[MediaKind, Any, str]]]:
    """Messages with placeholders in place of their media, and the media, for a caller who loads them himself.

    Returns:
        The messages, whose parts keep their options, and of each image and video its kind, what the part has, a URL as
        it is, and where it is.

    Raises:
        PromptError: something in a message is unknown or wrong, or a part has no image or video.
    """
    media: list[tuple[MediaKind, Any, str]] = []
    for message in _read(messages):
        for part in message.parts:
            if part.kind != "text":
                if part.media is None:
                    raise PromptError(f"{part.where} is of type {part.kind} and has none")
                media.append((part.kind, part.media, part.where))
    return [
        {**message, "content": [_without_media(part) for part in message["content"]]}
        if not isinstance(message.get("content"), (str, type(None)))
        else dict(message)
        for message in messages
    ], media


def _without_media(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = _kind("a part", part)
    if kind == "text":
        return dict(part)
    content = next((part[key] for key in _CONTENT_KEYS[kind] if part.get(key) is not None), None)
    detail = {"detail": content["detail"]} if isinstance(content, Mapping) and content.get("detail") else {}
    rest = {key: value for key, value in part.items() if key not in _CONTENT_KEYS[kind]}
    return {**rest, **detail, "type": kind}


@dataclass(frozen=True)
class _Part:
    """A part; ``media`` is None in a placeholder, ``where`` is for messages."""

    kind: Kind
    text: str = ""
    media: Any = None
    options: Any = None
    where: str = ""

    @property
    def for_template(self) -> dict[str, str]:
        return {"type": self.kind, "text": self.text} if self.kind == "text" else {"type": self.kind}


@dataclass(frozen=True)
class _Message:
    """A message; ``fields`` is for the template, besides role and content."""

    role: str
    parts: list[_Part]
    fields: dict[str, Any]


def _read(messages: Any) -> list[_Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
        raise PromptError(f"a prompt is a string or a list of messages, not {type(messages).__name__}")
    if not messages:
        raise PromptError("the prompt is empty: it has no messages")
    return [_message(f"message {number}", message) for number, message in enumerate(messages, start=1)]


def _message(where: str, message: Any) -> _Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f"{where} is not a dictionary with 'role' and 'content'")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where} has the unknown role {shown(role)}; known are {', '.join(ROLES)}")
    given = {key: value for key, value in message.items() if value is not None and key != "role"}
    if shown(given.get("type")) == "'message'":  # OpenAI's Responses say what an item is
        del given["type"]
    content = given.pop("content", None)
    extra = {key: given.pop(key) for key in _TEMPLATE_KEYS[role] if key in given}
    _reject_unknown(where, given, ("role", "content", *_TEMPLATE_KEYS[role]))
    if "tool_calls" in extra:
        extra["tool_calls"] = _tool_calls(where, extra["tool_calls"])
    for key, value in extra.items():
        if key != "tool_calls":
            if not isinstance(value, str):
                raise PromptError(f"{where}: {key} is {shown(value)}, not a string")
            checked_text(value, f"{where}, {key}")
    if content is None and role == "assistant":  # it may have made calls alone
        content = ""
    if isinstance(content, str):
        parts = [_Part("text", checked_text(content, where), where=where)]
    elif isinstance(content, Sequence) and not isinstance(content, (bytes, bytearray)):
        parts = [_part(f"{where}, part {number}", part) for number, part in enumerate(content, start=1)]
    else:
        raise PromptError(f"{where}: content is a string or a list of parts, not {shown(content)}")
    return _Message(role, parts, {key: value for key, value in extra.items() if value})


def _part(where: str, part: Any) -> _Part:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is {shown(part)}, not a dictionary with 'type'")
    given = {key: value for key, value in part.items() if value is not None}
    kind = _kind(where, part)
    given.pop("type", None)
    known = _CONTENT_KEYS[kind]
    keys = [key for key in known if key in given]
    if len(keys) > 1:
        raise PromptError(f"{where} has both {keys[0]!r} and {keys[1]!r}; give one of them")
    content = given.pop(keys[0]) if keys else None
    if kind == "text":
        _reject_unknown(where, given, ("type", *known))
        if not isinstance(content, str):
            raise PromptError(f"{where} is a text part without 'text'")
        return _Part(kind, checked_text(content, where), where=where)
    if isinstance(content, Mapping):
        inner = {key: value for key, value in content.items() if value is not None}
        content = inner.pop("url", None)
        if content is None:
            raise PromptError(f"{where}: {keys[0]!r} has no 'url'")
        if kind == "image" and "detail" in inner:
            if "detail" in given:
                raise PromptError(f"{where} has 'detail' twice, in {keys[0]} too; give one of them")
            given["detail"] = inner.pop("detail")
        _reject_unknown(f"{where}, {keys[0]}", inner, ("url", "detail") if kind == "image" else ("url",))
    options = {name: given.pop(name) for name in _OPTION_NAMES[kind] if name in given}
    if kind == "image":
        _apply_detail(where, given.pop("detail", "auto"), options)
    _reject_unknown(where, given, ("type", *known, *_OPTION_NAMES[kind]))
    try:
        return _Part(kind, media=content, options=_OPTIONS[kind](**options), where=where)
    except MediaError as error:
        raise PromptError(f"{where}: {error}") from None


def _kind(where: str, part: Mapping[str, Any]) -> Kind:
    """Of a part, by its type or else by its one key; that key's value may be None, as in a placeholder."""
    name = part.get("type")
    if name is not None:
        if not isinstance(name, str) or name not in _TYPES:
            raise PromptError(f"{where} has the unknown type {shown(name)}; known are {', '.join(_TYPES)}")
        return _TYPES[name]
    present = [key for key in _UNTYPED if key in part]
    keys = [key for key in present if part[key] is not None] or present
    if len(keys) > 1:
        raise PromptError(f"{where} has both {keys[0]!r} and {keys[1]!r}; give one of them")
    if not keys:
        raise PromptError(f"{where} has neither 'type' nor any of {', '.join(map(repr, _UNTYPED))}")
    return _TYPES[keys[0]]


def _apply_detail(where: str, detail: Any, options: dict[str, Any]) -> None:
    if not isinstance(detail, str) or detail not in ("auto", "high", "low"):
        raise PromptError(f"{where}: detail is {shown(detail)}; known are auto, high and low")
    if detail == "low":
        if options:
            raise PromptError(f"{where} has both 'detail': 'low' and {next(iter(options))!r}; give one of them")
        options["max_pixels"] = _LOW_DETAIL


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """OpenAI's calls with their arguments, which OpenAI writes as a JSON string, as objects."""
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise PromptError(f"{where}: tool_calls is {shown(calls)}, not a list")
    return [_from_json(f"{where}, tool call {number}", call, _tool_call) for number, call in enumerate(calls, start=1)]


def _from_json(where: str, value: Any, read: Callable[[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """What ``read`` makes of a value, which has JSON's types by then, and whose texts are checked."""
    try:
        found = read(where, json.loads(json.dumps(value)))
        checked_text(json.dumps(found, ensure_ascii=False), where)
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptError(f"{where} is no JSON: {str(error)[:200]}") from None
    return found


def _function(where: str, value: Any, form: str, keys: Collection[str]) -> dict[str, Any]:
    """The function of a tool or of a call."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise PromptError(f"{where} is not of the form {{'function': {{'name': ..., '{form}': ...}}}}")
    _reject_unknown(where, value, keys)
    if value.get("type") not in (None, "function"):
        raise PromptError(f"{where} has the unknown type {shown(value['type'])}; known is function")
    return function


def _tool(where: str, tool: Any) -> dict[str, Any]:
    function = _function(where, tool, "parameters", ("type", "function"))
    if not isinstance(function.get("description", ""), (str, type(None))):
        raise PromptError(f"{where}: the description is {shown(function['description'])}, not a string")
    parameters = function.get("parameters")
    if parameters is not None and not (isinstance(parameters, dict) and parameters.get("type", "object") == "object"):
        raise PromptError(f"{where}: the parameters are {shown(parameters)}, not a JSON schema of an object")
    return {"type": "function", "function": function}


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = _function(where, call, "arguments", ("id", "type", "function"))
    _reject_unknown(f"{where}, function", function, ("name", "arguments"))
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise PromptError(f"{where}: the arguments are {shown(arguments)}, not an object")
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _reject_unknown(where: str, given: Mapping[Any, Any], known: Collection[str]) -> None:
    for key, value in given.items():
        says_nothing = value is None or (isinstance(value, (list, tuple, dict)) and not value)
        if key not in known and key not in _IGNORED and not says_nothing:
            raise PromptError(f"{where} has the unknown key {shown(key)}; known are {', '.join(known)}")


def checked_text(text: str, where: str) -> str:
    """A text; raises PromptError for one with a lone surrogate."""
    found = LONE_SURROGATE.search(text)
    if found:
        raise PromptError(
            f"{where}: character {found.start() + 1} of the text is {found[0]!r}, a lone surrogate, which is no"
            " character; decode the text anew"
        )
    return text


def _split(text: str) -> list[_Part]:
    """Split a string at its placeholders."""
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, kind, ..., text
    return [
        _Part(_TYPES[piece]) if number % 2 else _Part("text", piece)
        for number, piece in enumerate(pieces)
        if number % 2 or piece
    ]


def resolve_url(media: Any, where: str) -> Any:
    """The path of a ``file://`` URL, the bytes of a ``data:`` URL, anything else as it is; a list item by item.

    ``data:video/jpeg;base64,A,B,...`` (or ``video/png``) is vLLM's form of a list of frames.

    Raises:
        PromptError: naming ``where`` it is: a remote URL, or a ``data:`` URL that cannot be decoded.
    """
    if isinstance(media, (list, tuple)):
        return [_resolve_url(frame, where) for frame in media]
    return _resolve_url(media, where)


def file_path(name: str) -> str:
    """The path of a ``file://`` URL; any other name is one already."""
    if name[:7].lower() != "file://":
        return name
    path = name[len("file://") :]
    return url2pathname(path.removeprefix("localhost") if path.startswith("localhost/") else path)


def _resolve_url(media: Any, where: str) -> Any:
    if not isinstance(media, str):
        return media
    scheme = media[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise PromptError(f"{where}: {shown(media)} is remote; download it and give the file")
    if scheme.startswith("data:"):
        return _decoded(media, where)
    return file_path(media)


def _decoded(url: str, where: str) -> bytes | list[bytes]:
    header, comma, payload = url[len("data:") :].partition(",")
    if not comma:
        raise PromptError(f"{where}: the data: URL has no comma, after which its data begins")
    kind, *parameters = (field.strip().lower() for field in header.split(";"))
    try:
        if "base64" not in parameters:
            return unquote_to_bytes(payload)
        if kind in FRAME_LISTS:
            return [_from_base64(frame) for frame in payload.split(",")]
        if "," in payload:
            raise PromptError(
                f"{where}: the data: URL of type {shown(kind)} is a list;"
                f" only {' and '.join(FRAME_LISTS)} may be, of frames"
            )
        return _from_base64(payload)
    except ValueError:
        form = "base64" if "base64" in parameters else "valid text"
        raise PromptError(f"{where}: the data: URL is not {form}") from None


def _from_base64(text: str) -> bytes:
    """As browsers take it: spaces and a missing end are allowed."""
    if "%" in text:
        text = unquote_to_bytes(text).decode("ascii")
    text = "".join(text.split()).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
