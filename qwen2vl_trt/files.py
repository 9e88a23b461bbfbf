"""Files that appear whole or not at all, also when the process is killed or the power fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacement(path: Path, check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """The name of a file to write, which takes the name ``path`` when the ``with`` ends well, and is removed otherwise.

    A device or a pipe, which cannot be replaced, is written itself.

    Args:
        check: is given the file once it is on the disk, and raises what speaks against it.

    Raises:
        OSError: it was not written, the disk is full, or the folder cannot be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        if check is not None:
            check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """:func:`replacement` with this content."""
    with replacement(path) as temporary:
        temporary.write_bytes(content)


def flush(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk; the latter where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    opened = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
