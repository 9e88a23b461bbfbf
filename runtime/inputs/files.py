"""Files that a user names: only regular ones, opened without blocking and read up to a limit."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qwen2vl_trt.errors import MediaError, reason
from qwen2vl_trt.messages import file_path

MAX_FILE_BYTES = 1 << 30
"""Of an image: more than 100 megapixels take, uncompressed, in 8 bits with transparency."""

MAX_VIDEO_BYTES = 1 << 36
"""Of a video, which is streamed: two hours at 76 Mbit/s."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
"""O_NONBLOCK: opening a pipe without a writer would block for ever."""

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe, as <(command) makes one"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "AAAA")  # JPEG, PNG, GIF, WebP, MP4 and HEIC


def labelled(source: object, name: str | None) -> str:
    """A source's label in error messages: its name, and its path if it has one."""
    if isinstance(source, (str, Path)):
        return f"{name} ({source})" if name else str(source)
    return name or "image"


@contextmanager
def opened(path: str | Path, label: str, kind: str = "an image") -> Iterator[BinaryIO]:
    """Open a regular file for reading: a pipe may block for ever, and a device has no end.

    Args:
        path: of the file, or its ``file://`` URL.
        label: for error messages.
        kind: what they say it should be.

    Raises:
        MediaError: another URL, or a file that does not exist, is not regular, is empty or cannot be read.
    """
    path = file_path(path) if isinstance(path, str) else path
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise MediaError(f"{label}: {_why_not(str(path), kind, error)}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        way_out = "" if stat.S_ISDIR(mode) else "; save what it gives as a file and name that"
        raise MediaError(f"{label}: {what}, not {kind}{way_out}")
    with os.fdopen(descriptor, "rb") as file:
        try:
            if not file.peek(1):
                raise MediaError(f"{label}: empty (0 bytes)")
            yield file
        except OSError as error:
            raise MediaError(f"{label}: cannot be read: {reason(error)}") from None


def read_whole(file: BinaryIO, label: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of a file, whatever size it claims. Raises MediaError above ``max_bytes``."""
    size = os.fstat(file.fileno()).st_size
    contents = file.read(min(size, max_bytes) + 1)  # read allocates what it is asked for
    if size < len(contents) <= max_bytes:
        contents += file.read(max_bytes + 1 - len(contents))
    if len(contents) > max_bytes:
        raise too_large(label, max_bytes)
    return contents


def too_large(label: str, max_bytes: int, kind: str = "an image") -> MediaError:
    return MediaError(f"{label}: more than {max_bytes:,} bytes, the most that are read of {kind} file; shrink it")


def _why_not(path: str, kind: str, error: OSError | ValueError) -> str:
    if not path:
        return "an empty name"
    if path.startswith("data:"):
        return "a data: URL, not a path; it goes in Request.images or Request.videos, or in a message's part"
    if _ADDRESS.match(path):
        return "addresses are not fetched; download it and give its path"
    if len(path) > 64 and (path.startswith(_BASE64_STARTS) or len(path) > 255) and _BASE64.fullmatch(path):
        return (
            f"it looks like the base64 of {kind}; give the bytes that it stands for, or a data: URL in a message's part"
        )
    if isinstance(error, FileNotFoundError):
        link = Path(path)
        return f"a link to {link.readlink()}, which is not there" if link.is_symlink() else "no such file"
    if isinstance(error, PermissionError) and Path(path).is_dir():  # Windows opens none
        return f"a directory, not {kind}"
    if isinstance(error, OSError) and error.errno == errno.ENXIO:
        return f"a socket or a device, not {kind}"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


class BoundedFile(io.RawIOBase):
    """An open regular file, read up to its size at this time: it ends even if it grows."""

    def __init__(self, file: BinaryIO) -> None:
        self.name = file.name
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._size - self._file.tell())
        return self._file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset, whence = self._size + offset, os.SEEK_SET
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
