"""Write a plan as TensorRT serialises it, so that it is never whole in memory, nor half there on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the ``with`` ends well, and is removed otherwise.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def stream_writer(trt: Any, file: BinaryIO) -> Any:
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
