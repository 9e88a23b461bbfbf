"""Files that appear whole or not at all, also when the process is killed or the power fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path, check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Give the name of a temporary file to write, and rename it to ``path`` where the ``with`` ends well.

    A device or a pipe, which cannot be replaced, is written itself.

    Args:
        check: is given the file once it is on the disk; what it raises prevents the renaming.

    Raises:
        OSError: nothing was written, the disk is full, or the folder cannot be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        if check is not None:
            check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file by :func:`atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def fsync(path: Path) -> None:
    """Put a file's content on the disk, or a folder's names where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    opened = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
