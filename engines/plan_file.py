"""Write a plan as TensorRT serialises it, so that it is never whole in memory, nor half there on the disk."""

from __future__ import annotations

from typing import Any, BinaryIO


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
