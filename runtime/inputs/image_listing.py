"""Image files of a folder or a glob, one at a time and always in the same order."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from qwen2vl_trt.errors import MediaError

from .image_formats import image_suffixes

_NAMED = 8
"""Suffixes of other files that a message names."""


class ImageFile(NamedTuple):
    """A file and the name that its features get."""

    key: str
    path: str


def input_root(source: str) -> Path:
    """What the keys are relative to: the folder, or the part of a glob before its first wildcard."""
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
    """The images of a folder and the folders below it, or those that a glob (``**`` included) matches.

    Of a folder the files are taken whose ending, in any case, is among
    :func:`~qwen2vl_trt.runtime.inputs.image_formats.image_suffixes`; of a glob, whatever it matches.
    Keys are paths relative to :func:`input_root`, with ``/``. Order: a folder's files by name, then its folders by
    name. Memory: the names in one folder; of a glob, all that it matches. Names that begin with a dot are left out, as
    shells do. Links to files are followed, and listed if they lead nowhere: reading them says so. Links to folders,
    which may lead in a circle, are followed where a glob names or matches one, not below a folder or a ``**``.

    Args:
        source: the folder, the glob, or one file.
        passed_over: counts, by suffix, what lies in the folders and is not taken; names with a dot in front are not
            counted.

    Raises:
        MediaError: there is no such folder or match, the source is empty, or a folder cannot be listed.
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
    """Images named one by one; the key is the path as given.

    Raises:
        MediaError: one is given twice.
    """
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise MediaError(f"{path} is given twice; each image's features are stored under its path")
        seen.add(path)
    return [ImageFile(path, path) for path in paths]


def counted(passed_over: Counter[str]) -> str:
    """What was passed over, for a message: ``12 .heic, 3 .txt``; of the rarest suffixes their sum."""
    most = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {kind}" for kind, count in most[:_NAMED]]
    others = sum(count for _, count in most[_NAMED:])
    return ", ".join([*parts, f"{others:,} others"] if others else parts)


def _matches(folder: str, pattern: Sequence[str]) -> Iterator[str]:
    """What a glob matches below a folder; the ``**`` of :mod:`glob` goes round in a circle of links 40 times."""
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
    """Whether it is a file, or a link that leads nowhere; nothing that would wait when it is opened, as a pipe does."""
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
    raise MediaError(f"{error.filename} cannot be listed: {error.strerror or error}") from None
