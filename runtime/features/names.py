"""What features can be called: tensors of a safetensors file, and images in lines of JSON."""

from __future__ import annotations

import json
import re

_RESERVED = "__metadata__"
_LONGEST = 1 << 16  # bytes; a path on Linux has at most 4,096
_LIKE_SPELLED_OUT = re.compile(r"(?<!\\)\\+(?=ud[89a-f][0-9a-f]{2}|[\ud800-\udfff])")


def name_fault(name: str) -> str | None:
    """Why no tensor of a safetensors file can have a name, if so."""
    if name == _RESERVED:
        return "safetensors keeps this name for itself; rename it"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    if size > _LONGEST:
        return f"its name has more than {_LONGEST:,} bytes; rename it"
    return None


def header_bytes(name: str) -> int:
    """What a tensor takes in a shard's header at most, its grid included: twice JSON, all escaped."""
    return len(json.dumps(name)) + len(json.dumps(json.dumps(name))) + 256


def as_unicode(text: str) -> str:
    """Text with bytes of a file's name that are no UTF-8, spelled out: readers of JSON and Parquet refuse them.

    No two texts become the same: backslashes before what is spelled out, or looks like it, are doubled.
    """
    return _LIKE_SPELLED_OUT.sub(r"\g<0>\g<0>", text).encode("utf-8", "backslashreplace").decode()
