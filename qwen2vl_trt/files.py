"""Files that appear whole or not at all, also when the process is killed or the power fails."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FileError, reason


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is for.

    Raises:
        FileError: it is a folder, its folder is missing, or there is no permission.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise FileError(f"{path} is a folder; give a file")
    if not folder.is_dir():
        raise FileError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() and not path.is_file() else folder, os.W_OK):
        raise FileError(f"{path}: no permission to write there")


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill the :func:`atomic_file` of a file that a user named.

    Raises:
        FileError: it cannot be written.
    """
    try:
        with atomic_file(path) as temporary:
            write(temporary)
    except OSError as error:
        raise FileError(f"{path}: {reason(error)}") from None


def write_json(path: Path, content: Any) -> None:
    """:func:`write_result` with JSON, which has no infinity: NaN and infinity must be None in ``content``."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_result(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
