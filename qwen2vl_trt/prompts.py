"""From what a user asks to token ids.

A request is a plain string or a list of messages in the form of OpenAI or Qwen. Either becomes messages whose
parts are text, images and videos; the checkpoint's own chat template and tokenizer do the rest, and each image
or video token is repeated once for every merged patch, as Transformers' ``Qwen2_5_VLProcessor`` does.

Where images go:

- In a string, whether the whole prompt or a user message's content, ``<image>`` and ``<video>`` mark positions.
  A prompt with neither gets its images first, then its videos, then its text.
- In a list of parts, the parts mark the positions, and ``<image>`` in a text part is plain text.

The model's own vision tokens (``<|image_pad|>`` and so on) have no place in a user's text: an image that no pixels
belong to would shift every position after it. Such a text is refused, in any message, not repaired: silently
dropping the token would change what was asked. Other special tokens are read as Transformers reads them.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .config import Qwen2VLConfig, read_json
from .downloads import lacking
from .errors import CheckpointError, PromptError

Message = Mapping[str, Any]
Grid = Sequence[int]

ROLES = ("system", "user", "assistant")
_PART_KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video"}
_MEDIA_KEYS = {"image": ("image", "image_url", "url", "path"), "video": ("video", "url", "path")}
_NO_TEMPLATE = "has no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
_PLACEHOLDER = re.compile(r"<(image|video)>")


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the decoder.

    Attributes:
        token_ids: with image and video tokens repeated, one for each row of the vision output.
        text: the rendered chat template, before the repetition; for people to read.
    """

    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class Media:
    """The images and videos of messages, in the order of their tokens.

    ``video_fps`` has each video part's ``fps``, or None where it has none.
    """

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    video_fps: list[float | None] = field(default_factory=list)


class PromptBuilder:
    """The prompts of one checkpoint.

    Args:
        folder: checkpoint with tokenizer files and a chat template.
        config: its configuration.

    Raises:
        CheckpointError: no readable tokenizer, no chat template, or a tokenizer of another model.
    """

    def __init__(self, folder: str | Path, config: Qwen2VLConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(folder)
        self._refused = set()
        ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        for token_id in ids:
            token = None if token_id is None else self.tokenizer.convert_ids_to_tokens(token_id)
            if token is not None:
                self._refused.add(token)
        for name, token_id in (("image", config.image_token_id), ("video", config.video_token_id)):
            if self.tokenizer.convert_ids_to_tokens(token_id) is None:
                raise CheckpointError(f"{folder}: the tokenizer lacks the {name} token {token_id} of config.json")

    def build(
        self,
        prompt: str | Sequence[Message],
        image_grids: Sequence[Grid] = (),
        video_grids: Sequence[Grid] = (),
    ) -> Prompt:
        """Turn a request into token ids.

        Args:
            prompt: a string, or messages.
            image_grids: ``(t, h, w)`` of each image, in patches, in the order of their places.
            video_grids: the same of each video.

        Raises:
            PromptError: images or videos do not match their places, an empty prompt, an unknown role or part, a
                vision token in the text, or a chat template that refuses the messages.
        """
        messages = to_messages(prompt, len(image_grids), len(video_grids))
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        for token in sorted(self._refused):
            if any(token in text for text in texts):
                raise PromptError(
                    f"the text contains {token!r}, which only the chat template may write;"
                    " mark an image's place with <image>, a video's with <video>"
                )
        text = self._render(messages)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = self._repeat(ids, self.config.image_token_id, "image", image_grids)
        ids = self._repeat(ids, self.config.video_token_id, "video", video_grids)
        return Prompt(ids, text)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        # A message of nothing but text goes in as a string: every chat template takes that.
        plain = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            if all(part["type"] == "text" for part in message["content"])
            else message
            for message in messages
        ]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise PromptError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from None

    def _repeat(self, ids: list[int], token_id: int, kind: str, grids: Sequence[Grid]) -> list[int]:
        found = ids.count(token_id)
        if found != len(grids):
            raise PromptError(f"the chat template made {found} {kind} tokens of {len(grids)} {kind}s")
        lengths = iter(grids)
        repeated: list[int] = []
        for token in ids:
            if token == token_id:
                t, h, w = (int(size) for size in next(lengths))
                repeated += [token_id] * (t * h * w // self.config.vision.merge_unit)
            else:
                repeated.append(token)
        return repeated


def check_tokenizer_files(folder: str | Path) -> None:
    """Check that a checkpoint has a tokenizer and a chat template, without reading either: see :func:`load_tokenizer`.

    Raises:
        CheckpointError: one of them is missing, or ``tokenizer_config.json`` cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise lacking(folder, "has no tokenizer: neither tokenizer.json nor vocab.json")
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return
    if not read_json(folder / "tokenizer_config.json").get("chat_template"):
        raise lacking(folder, _NO_TEMPLATE)


def load_tokenizer(folder: str | Path) -> Any:
    """The checkpoint's tokenizer (Transformers), with the chat template that its processor would use.

    The template lies in ``chat_template.jinja`` (newer), ``chat_template.json`` (older processors) or
    ``tokenizer_config.json``; the first of these wins, as in Transformers.

    Raises:
        CheckpointError: no tokenizer, or no chat template.
    """
    folder = Path(folder)
    check_tokenizer_files(folder)
    load: Any
    if (folder / "tokenizer.json").is_file():  # complete in itself; AutoTokenizer takes two seconds more to import
        from transformers import PreTrainedTokenizerFast

        load = PreTrainedTokenizerFast.from_pretrained
    else:
        from transformers import AutoTokenizer

        load = AutoTokenizer.from_pretrained
    try:
        tokenizer = load(folder, local_files_only=True)
    except Exception as error:  # corrupt files raise anything, even bare Exception from the Rust side
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())}") from None
    tokenizer.model_max_length = int(1e30)  # the engines have the limit; this one would only warn
    legacy = folder / "chat_template.json"
    if legacy.is_file() and not (folder / "chat_template.jinja").is_file():
        try:
            tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{legacy} cannot be read: {error}") from None
    if not tokenizer.chat_template:  # an empty file
        raise CheckpointError(f"{folder} {_NO_TEMPLATE}")
    return tokenizer


def to_messages(prompt: str | Sequence[Message], images: int = 0, videos: int = 0) -> list[dict[str, Any]]:
    """Bring a request into one form: every message a role and a list of parts, with the media left out.

    Args:
        prompt: a string, or messages.
        images: number of images that come with it (those inside the messages included).
        videos: number of videos.

    Returns:
        ``[{"role": ..., "content": [{"type": "text", "text": ...} | {"type": "image"} | {"type": "video"}]}]``.

    Raises:
        PromptError: the places do not match the media, the prompt is empty, or a role or part is unknown.
    """
    if isinstance(prompt, str):
        parts = _split(prompt)
        if not any(part["type"] != "text" for part in parts):
            parts = [{"type": "image"}] * images + [{"type": "video"}] * videos + parts
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    else:
        messages = [
            {"role": message["role"], "content": [_without_media(part) for part in message["content"]]}
            for message in _checked(prompt)
        ]
    for kind, given in (("image", images), ("video", videos)):
        places = sum(part["type"] == kind for message in messages for part in message["content"])
        if places != given:
            raise PromptError(f"places for {kind}s in the prompt (<{kind}> or parts): {places}; {kind}s given: {given}")
    parts = [part for message in messages for part in message["content"]]
    if not any(part["type"] != "text" or part["text"].strip() for part in parts):
        raise PromptError("the prompt is empty: it has neither text nor images nor videos")
    return messages


def extract_media(messages: Sequence[Message], images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Media:
    """Collect the images and videos of messages, in order.

    A part may carry its own (``{"type": "image", "image": ...}``, ``{"type": "image_url", "image_url": {"url": ...}}``,
    ``{"type": "video", "video": ..., "fps": ...}``): a path, ``file://`` or ``data:`` URL, or any object that the
    preprocessor takes. A part without takes the next of ``images`` or ``videos``.

    Raises:
        PromptError: parts without media and media without a part, a remote URL, or an unknown role or part.
    """
    pools = {"image": list(images), "video": list(videos)}
    given = {kind: len(pool) for kind, pool in pools.items()}
    empty = {"image": 0, "video": 0}
    media = Media()
    for message in _checked(messages):
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                continue
            found = part.get("media")
            if found is None:
                empty[kind] += 1
                found = pools[kind].pop(0) if pools[kind] else None
            (media.images if kind == "image" else media.videos).append(found)
            if kind == "video":
                media.video_fps.append(part.get("fps"))
    for kind in pools:
        if empty[kind] != given[kind]:
            raise PromptError(
                f"places for {kind}s that the messages leave open (<{kind}> or parts): {empty[kind]};"
                f" {kind}s given: {given[kind]}"
            )
    return media


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Messages with a known role each and a list of known parts; a part keeps its media under ``media``."""
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise PromptError(f"a prompt is a string or a list of messages, not {type(messages).__name__}")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise PromptError(f"message {number} is not a dictionary with 'role' and 'content'")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise PromptError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
        if isinstance(content, str):
            parts = _split(content) if role == "user" else [{"type": "text", "text": content}]
        elif isinstance(content, Sequence):
            parts = [_part(number, part) for part in content]
        else:
            raise PromptError(f"message {number}: content is a string or a list of parts, not {content!r}")
        checked.append({"role": role, "content": parts})
    return checked


def _part(number: int, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _PART_KINDS:
        known = ", ".join(_PART_KINDS)
        raise PromptError(f"message {number} has a part of the unknown type {kind!r}; known are {known}")
    kind = _PART_KINDS[kind]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PromptError(f"message {number} has a text part without 'text'")
        return {"type": "text", "text": part["text"]}
    found = next((part[key] for key in _MEDIA_KEYS[kind] if part.get(key) is not None), None)
    return {"type": kind, "media": _local(number, found), "fps": part.get("fps")}


def _local(number: int, media: Any) -> Any:
    """Undo the wrappings of OpenAI and Qwen: ``{"url": ...}``, ``file://`` and ``data:``."""
    if isinstance(media, Mapping):
        media = media.get("url")
    if not isinstance(media, str):
        return media
    if media.startswith("file://"):
        return url2pathname(urlsplit(media).path)
    if media.startswith(("http://", "https://")):
        raise PromptError(f"message {number}: {media!r} is remote; download it and give the file")
    if media.startswith("data:"):
        header, _, payload = media.partition(",")
        try:
            if not header.endswith(";base64"):
                raise ValueError
            return base64.b64decode(payload, validate=True)
        except (ValueError, binascii.Error):
            raise PromptError(f"message {number}: the data: URL is not base64") from None
    return media


def _split(text: str) -> list[dict[str, Any]]:
    """Cut a string at its placeholders."""
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, kind, ..., text
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _without_media(part: dict[str, Any]) -> dict[str, Any]:
    return {key: part[key] for key in ("type", "text") if key in part}
