"""Reading an exported graph, whose weights lie in other files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qwen2vl_trt.errors import EngineError, reason


@contextmanager
def read_onnx(path: Path) -> Iterator[onnx.ModelProto]:
    """An ONNX file's content, without its weights.

    A damaged file may parse and still make no sense: what the ``with`` meets then is the file's error.

    Raises:
        EngineError: it cannot be read, or is corrupt.
    """
    try:
        yield onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {reason(error)}. Rebuild.") from None
    except (DecodeError, LookupError, TypeError, ValueError) as error:
        raise EngineError(f"{path} is corrupt ({reason(error)}). Rebuild.") from None
