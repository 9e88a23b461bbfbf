"""TensorRT's timing cache, kept between builds: a second build of the same model measures no kernel again."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from qwen2vl_trt.files import atomic_write

logger = logging.getLogger(__name__)


def timing_cache_path(folder: Path, version: str, gpu: str) -> Path:
    """One file a TensorRT version and GPU, beside the engine folders, whichever models they hold."""
    return folder.parent / f".timing-cache-{version}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}"


def load_timing_cache(config: Any, path: Path) -> None:
    """Give a builder configuration the cache of earlier builds; an empty one where there is none or it is damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        logger.warning("%s is damaged and is not used; the build measures anew", path)


def save_timing_cache(config: Any, path: Path) -> None:
    """Write it back, atomically. A cache that cannot be written costs the next build time, not this one its engine."""
    try:
        atomic_write(path, memoryview(config.get_timing_cache().serialize()))
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error.strerror or error)
