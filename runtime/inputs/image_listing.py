"""Image files of a folder or a glob, in a fixed order."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from qwen2vl_trt.errors import MediaError, reason

from .image_formats import image_suffixes

_MAX_SUFFIXES = 8  # in a message


class ImageFile(NamedTuple):
    """A file and the name of its features."""

    key: str
    path: str


def input_root(source: str) -> Path:
    """The folder that keys are relative to: of a glob, the part before its first wildcard."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    plain: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain)


def list_images(source: str, passed_over: Counter[str] | None = None) -> Iterator[ImageFile]:
    """Images below a folder, or the files that a glob (with ``**``) matches.

    A folder's files are selected by :func:`~qwen2vl_trt.runtime.inputs.image_formats.image_suffixes`. Keys are paths
    relative to :func:`input_root`, with ``/``. Order: files by name, then folders by name. Memory: the names in one
    folder; of a glob, all matches. Names that begin with a dot are left out. Links to files are followed, and listed if
    broken: reading them fails. Links to folders, which may be circular, are followed only where a glob matches them.

    Args:
        source: a folder, a glob, or one file.
        passed_over: counts the folders' other files, by suffix, except names that begin with a dot.

    Raises:
        MediaError: no such folder or match, an empty source, or a folder that cannot be listed.
    """
    if not source:
        raise MediaError("the input is empty: it names no folder, file or glob")
    root = input_root(source)
    if Path(source).is_dir():
        yield from _walk(str(root), "", Counter() if passed_over is None else passed_over)
        return
    if Path(source).is_file():
        yield ImageFile(root.joinpath(source).name, source)
        return
    matches = sorted({match for match in _matches(".", Path(source).parts) if _is_image_file(match)})
    if not matches:
        raise MediaError(f"{source}: there is no such folder, and as a glob it matches no file")
    for match in matches:
        # Not os.path.relpath: behind a wildcard it would call a/../b.png and c/../b.png by one name.
        yield ImageFile(Path(match).relative_to(root).as_posix(), match)


def given_images(paths: Sequence[str]) -> list[ImageFile]:
    """Single images; the key is the path as given. Raises MediaError for a duplicate."""
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise MediaError(f"{path} is given twice; each image's features are stored under its path")
        seen.add(path)
    return [ImageFile(path, path) for path in paths]


def counted(passed_over: Counter[str]) -> str:
    """For messages: ``12 .heic, 3 .txt, 7 others``."""
    counts = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {kind}" for kind, count in counts[:_MAX_SUFFIXES]]
    others = sum(count for _, count in counts[_MAX_SUFFIXES:])
    return ", ".join([*parts, f"{others:,} others"] if others else parts)


def _matches(folder: str, pattern: Sequence[str]) -> Iterator[str]:
    """Matches of a glob below a folder; the ``**`` of :mod:`glob` follows circular links 40 times."""
    if "**" not in pattern:
        for match in glob.iglob(str(Path(*pattern)), root_dir=folder):  # noqa: PTH207  Path.glob lists dot names
            yield str(Path(folder, match))
        return
    place = pattern.index("**")
    for top in _matches(folder, pattern[:place]) if place else [folder]:
        for below, folders, _ in os.walk(top, onerror=_cannot_be_listed):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from _matches(below, pattern[place + 1 :] or ["*"])


def _is_image_file(path: str) -> bool:
    """Whether it is a regular file or a broken link, not something like a pipe, which blocks when opened."""
    return Path(path).is_file() or (Path(path).is_symlink() and not Path(path).exists())


def _walk(folder: str, prefix: str, passed_over: Counter[str]) -> Iterator[ImageFile]:
    suffixes, files = image_suffixes(), list[str]()
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:  # only names are kept: an entry is several times larger
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif Path(entry.name).suffix.lower() in suffixes and _is_image_file(entry.path):
                    files.append(entry.name)
                else:
                    passed_over[_kind(entry)] += 1
    except OSError as error:
        _cannot_be_listed(error)
    files.sort()
    folders.sort()
    for name in files:
        yield ImageFile(prefix + name, f"{folder}/{name}")
    del files
    for name in folders:
        yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", passed_over)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_dir():
        return "links to folders"
    return Path(entry.name).suffix.lower() or "without a suffix"


def _cannot_be_listed(error: OSError) -> NoReturn:
    raise MediaError(f"{error.filename} cannot be listed: {reason(error)}") from None
