"""A checkpoint's JSON against declared types: a wrong value is an error that names field, value and range.

The types are annotations: of a dataclass's fields, or one alone, with ``msgspec.Meta`` for a range.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from reprlib import repr as shown
from typing import Any, TypeVar

import msgspec

from .errors import CheckpointError

T = TypeVar("T")

_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_SHOWN = 60  # characters of a field's name in a message


def checked(raw: Any, kind: type[T], place: str) -> T:
    """A value read from JSON, as its declared type; fields that the type does not have are passed over.

    Args:
        raw: what JSON held.
        kind: a dataclass or another type that msgspec can check.
        place: where the value stands, for the message: ``config.json: vision_config``.

    Raises:
        CheckpointError: of another type, outside its range, or a field is missing.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.removesuffix("`")
        missing = _MISSING.fullmatch(what)
        if missing:
            raise CheckpointError(f"{inside(place, path)}: field {missing[1]!r} is missing") from None
        value = shown(_at(raw, path))
        raise CheckpointError(f"{inside(place, path)} is {value}; {what[:1].lower()}{what[1:]}") from None


def reject_unknown(
    raw: Mapping[str, Any], consumed: Collection[str], harmless: Mapping[str, tuple[Any, ...] | None], place: str
) -> None:
    """Refuse fields that nobody reads, unless they are known to leave the answer alone.

    Args:
        raw: an object of JSON.
        consumed: names of the fields that are read.
        harmless: names of fields that need not be read, with the values that are harmless; None allows any.
        place: where the object stands, for the message.

    Raises:
        CheckpointError: another field, or one of these with another value.
    """
    for name, value in raw.items():
        if name in consumed:
            continue
        if name not in harmless:
            raise CheckpointError(
                f"{inside(place, '.' + name[:_SHOWN])} is not known and may change the answer; remove it if it does not"
            )
        allowed = harmless[name]
        if allowed is not None and value not in allowed:
            only = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{inside(place, '.' + name)} is {shown(value)}; only {only} is supported")


def inside(place: str, path: str) -> str:
    """``config.json`` and ``.depth`` to ``config.json: depth``; ``config.json: a`` and ``.b[0]`` to ``... a.b[0]``."""
    return f"{place}: {path[1:]}" if path.startswith(".") and ": " not in place else place + path


def _at(raw: Any, path: str) -> Any:
    """The value at msgspec's path; what surrounds it where a path leads through the keys of an object."""
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        try:
            raw = raw[name] if name else raw[int(index)]
        except (KeyError, IndexError, TypeError):
            break
    return raw
