"""Paths and URIs, read through one interface: fsspec's, over pyarrow's own clients for object stores."""

from __future__ import annotations

from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import FileSystem

from qwen2vl_trt.errors import MediaError

_NATIVE = ("s3", "gs", "gcs")
"""pyarrow's wheels bring clients for these: no further package, credentials from the environment."""


def is_uri(path: str) -> bool:
    """Whether a path is for a file system, ``s3://bucket/key`` for one, and not a path of this machine."""
    return "://" in path


def open_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system that a path or URI is on, and the path there.

    Raises:
        MediaError: no such file system, or its package is not installed.
    """
    try:
        if path.split("://")[0] in _NATIVE and is_uri(path):
            # A wildcard is no part of a URI that pyarrow takes, so only the bucket goes into it.
            scheme, rest = path.split("://", 1)
            filesystem, _ = FileSystem.from_uri(f"{scheme}://{rest.split('/', 1)[0]}")
            return ArrowFSWrapper(filesystem), rest
        return url_to_fs(path)
    except (ValueError, ImportError, OSError) as error:
        raise MediaError(f"{path} cannot be opened: {error}") from None
