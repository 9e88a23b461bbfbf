"""An engine folder is replaced as a whole: the old engines work until the new ones do.

A build writes into ``.building`` inside the folder, the same file system, so that weights can be hard-linked and files
renamed. Then one rename, ``.building`` to ``.built``, decides: before it the old engines are untouched, after it the
new ones are whole. Their files still move to their places, the manifest last: :func:`finish` does that again where it
was broken off, and is called by whoever reads the manifest. So either the old or the new engines load, at any moment.

The folder itself is not renamed: it may be a mount point, or hold other files. Files are never written in place: they
may be hard links to a checkpoint, and a running process keeps the files that it has mapped.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qwen2vl_trt.files import atomic_write, fsync

from .options import LENGTHS_PLAN

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
LOCK = ".lock"
"""Stays in the folder, and so marks it as one that builds may clear."""
MODEL_FILES = {".json", ".jinja", ".txt", ".safetensors"}
"""Suffixes of the files that belong to a model in a built folder, and that the next build there replaces."""

_BUILDING, _BUILT = ".building", ".built"
_NAMES = ".names"
"""In ``.built``: the names of all its files, of those too that have moved already."""
_ENGINE_FILES = {
    f"{engine}{suffix}"
    for engine in ("vision", "decoder", LENGTHS_PLAN)
    for suffix in (".onnx", ".onnx.data", ".engine", ".layers")
}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process builds in the folder, and keep them waiting.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another build is at work there; waiting for it", folder)
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(errno.ENOLCK, f"no locks on this file system ({error})") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder for a build, whose files replace the older ones when the ``with`` ends well; while :func:`alone`.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    _move(folder)
    building = folder / _BUILDING
    _remove(building)
    building.mkdir()
    try:
        yield building
        names = sorted(path.name for path in building.iterdir())
        for name in names:
            if (folder / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder there, and a file of the engines")
        atomic_write(building / _NAMES, "\n".join(names).encode())
        building.rename(folder / _BUILT)
        fsync(folder)
    finally:
        _remove(building)
    _move(folder)


def finish(folder: Path) -> None:
    """Move the files of a build that was killed while it did so.

    Raises:
        OSError: the folder cannot be written.
    """
    if (folder / _BUILT).is_dir():
        with alone(folder):
            _move(folder)


def _move(folder: Path) -> None:
    built = folder / _BUILT
    names = (built / _NAMES).read_text(encoding="utf-8").split("\n") if (built / _NAMES).is_file() else []
    if MANIFEST_FILE in names:  # not where the power failed before the list was on the disk
        for old in folder.iterdir():  # one that the new model lacks would be read instead of its own
            ours = old.suffix in MODEL_FILES or old.name in _ENGINE_FILES
            if ours and old.name not in names and not old.is_dir():
                old.unlink()
        for name in sorted(names, key=lambda name: name == MANIFEST_FILE):
            if (built / name).is_file():
                (built / name).replace(folder / name)
        (built / _NAMES).unlink()
    _remove(built)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
