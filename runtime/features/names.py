"""What features can be called: tensors of a safetensors file, and images in lines of JSON."""

from __future__ import annotations

import json

_RESERVED = "__metadata__"
_LONGEST = 1 << 16  # bytes; a path on Linux has at most 4,096


def name_fault(name: str) -> str | None:
    """Why no tensor of a safetensors file can have a name, if so."""
    if name == _RESERVED:
        return "safetensors keeps this name for itself; rename it"
    if as_unicode(name) != name:
        return "its name is not valid UTF-8; rename it"
    if len(name.encode()) > _LONGEST:
        return f"its name has more than {_LONGEST:,} bytes; rename it"
    return None


def header_bytes(name: str) -> int:
    """What a tensor takes in a shard's header at most, its grid included: twice JSON, all escaped."""
    return len(json.dumps(name)) + len(json.dumps(json.dumps(name))) + 256


def as_unicode(text: str) -> str:
    """Text with bytes of a file's name that are no UTF-8, spelled out: readers of JSON and Parquet refuse them."""
    return text.encode("utf-8", "backslashreplace").decode()
