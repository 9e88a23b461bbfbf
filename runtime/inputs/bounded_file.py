"""A file that ends where it ended when it was opened, however it grows while it is read."""

from __future__ import annotations

import io
import os
from typing import Any, BinaryIO


class BoundedFile(io.RawIOBase):
    """Reads a regular file that is open for reading."""

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
