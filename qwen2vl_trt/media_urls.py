"""Images and videos that are given as URLs, as in OpenAI's and Qwen's messages."""

from __future__ import annotations

import base64
from reprlib import repr as shown
from typing import Any
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

from .errors import PromptError

_LISTS = ("video/jpeg", "video/png")


def local(media: Any, where: str) -> Any:
    """The path of a ``file://`` URL, the bytes of a ``data:`` URL, or what is no URL as it is.

    A list of frames is a list of these; ``data:video/jpeg;base64,A,B,...`` is vLLM's form of a list of JPEG files,
    and ``data:video/png`` that of PNG files.

    Args:
        media: what a message's part gives.
        where: what messages call the part.

    Raises:
        PromptError: a URL that must be fetched first, or a ``data:`` URL that cannot be decoded.
    """
    if isinstance(media, (list, tuple)):
        return [_local(frame, where) for frame in media]
    return _local(media, where)


def file_path(name: str) -> str:
    """The path of a ``file://`` URL; any other name is one already."""
    if name[:7].lower() != "file://":
        return name
    path = name[len("file://") :]
    return url2pathname(path.removeprefix("localhost") if path.startswith("localhost/") else path)


def _local(media: Any, where: str) -> Any:
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
        if kind in _LISTS:
            return [_from_base64(frame) for frame in payload.split(",")]
        if "," in payload:
            raise PromptError(
                f"{where}: the data: URL of type {shown(kind)} is a list; only {' and '.join(_LISTS)} may be, of frames"
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
