"""Write a plan as TensorRT serialises it: never whole in memory, never half on the disk, hashed on its way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qwen2vl_trt.errors import BuildError


class HashedFile:
    """A file that is written from its start to its end, and its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write all of the bytes."""
        self._digest.update(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hex."""
        return self._digest.hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[HashedFile]:
    """A file that takes its name when the ``with`` ends well, and is removed otherwise.

    Raises:
        BuildError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror or error}; nothing that loads was left there") from None
    finally:
        temporary.unlink(missing_ok=True)


def stream_writer(trt: Any, file: HashedFile) -> Any:
    """TensorRT's stream into a file.

    Returns:
        An ``IStreamWriter``; its ``error`` is the one that ended it, which TensorRT would swallow.
    """

    class Writer(trt.IStreamWriter):
        error: OSError | None = None

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
