"""The manifest of an engine folder: what it was built from, for what, and with what.

A folder without one holds no engine; one whose files differ from it is refused. Hashing gigabytes at every start would
cost more than loading them: a file that has its size and its time of modification is taken for the one that was built,
one with another time is hashed, and ``inspect --verify`` hashes all.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, CheckpointError, EngineError, program, reason
from qwen2vl_trt.files import atomic_write, file_hash
from qwen2vl_trt.schema import convert, forbid_unknown_fields

from .profile import BuildProfile
from .staging import MANIFEST_FILE, finish

FORMAT = 3
"""Raised when an engine folder of an older build must not be loaded any more."""

_SECOND = 10**9  # in the nanoseconds of mtime_ns


class NoEngineError(EngineError):
    """A folder without a manifest."""


@dataclass(frozen=True)
class BuiltFile:
    """A file as the build left it; ``sha256`` in hex, ``mtime_ns`` in nanoseconds since 1970."""

    sha256: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> BuiltFile:
        """Describe a file; reads it."""
        stat = path.stat()
        return cls(file_hash(path), stat.st_size, stat.st_mtime_ns)

    def difference(self, path: Path, thorough: bool) -> str | None:
        """How a file differs from this one, in words, or None. ``thorough`` hashes it whatever its time says."""
        stat = path.stat()
        if stat.st_size != self.bytes:
            return f"it has {stat.st_size:,} bytes instead of {self.bytes:,}"
        whole_seconds = self.mtime_ns // _SECOND * _SECOND  # what archives and some file systems keep
        if not thorough and stat.st_mtime_ns in (self.mtime_ns, whole_seconds):
            return None
        return None if file_hash(path) == self.sha256 else "SHA-256 differs"


@dataclass(frozen=True)
class MergedAdapter:
    """A LoRA adapter that was merged into the model.

    Attributes:
        name: of its folder.
        hash: see :attr:`qwen2vl_trt.lora.Adapter.hash`.
        model_hash: of the checkpoint that was given with it; of the quantised one in FP8, which has the adapter merged.
    """

    name: str
    hash: str
    model_hash: str


@dataclass(frozen=True)
class Manifest:
    """What an engine folder holds.

    Attributes:
        model_hash: see :attr:`qwen2vl_trt.checkpoint.Checkpoint.hash`.
        lora: what ``--lora`` named.
        files: those that the build made, by name.
        versions: of the packages that made them.
        options: of the backend, those that are not its defaults.
    """

    model: str
    model_hash: str
    backend: str
    precision: str
    profile: BuildProfile
    files: dict[str, BuiltFile]
    versions: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    lora: MergedAdapter | None = None
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write the manifest; the folder is an engine from here on."""
        atomic_write(folder / MANIFEST_FILE, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest, once a build that was killed at its very end is finished.

        Raises:
            NoEngineError: there is none.
            EngineError: it cannot be read, is corrupt, or of another format.
        """
        path = folder / MANIFEST_FILE
        try:
            finish(folder)
        except OSError as error:
            raise EngineError(
                f"{folder}: a build was killed while its files took their places, and it cannot be finished"
                f" ({reason(error)}). Make the folder writable."
            ) from None
        try:
            raw = msgspec.json.decode(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            what = (
                f"{folder} holds no engine: it has no {MANIFEST_FILE}"
                if folder.is_dir()
                else f"there is no folder {folder}"
            )
            raise NoEngineError(f"{what}. Build one with {_build(folder)}.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise EngineError(f"{path} cannot be read ({error}). Rebuild with {_build(folder)} --force.") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise EngineError(
                f"{folder} was built in format {found!s:.60}, this release loads format {FORMAT}."
                f" Rebuild with {_build(folder)} --force."
            )
        try:
            manifest = convert(raw, cls, MANIFEST_FILE)
            forbid_unknown_fields(raw, [each.name for each in fields(cls)], {}, MANIFEST_FILE)
            for name in manifest.files:
                if Path(name).name != name or not name.isprintable():
                    raise CheckpointError(f"{MANIFEST_FILE}: {name!r} is no name of a file")
            BuildProfile.from_dict(raw["profile"])  # its names
        except (BuildError, CheckpointError) as error:
            raise EngineError(f"{path} is corrupt ({error}). Rebuild with {_build(folder)} --force.") from None
        return manifest

    def verify(self, folder: Path, thorough: bool = False) -> Checkpoint:
        """Check that the folder still holds what was built, byte for byte if ``thorough``; returns its checkpoint.

        Raises:
            EngineError: a file is missing or differs from the one that was built.
        """
        for name, built in self.files.items():
            try:
                difference = built.difference(folder / name, thorough)
            except OSError as error:
                raise EngineError(f"{folder / name} cannot be read: {reason(error)}. Rebuild.") from None
            if difference:
                raise EngineError(f"{folder / name} is not the file that was built ({difference}). Rebuild.")
        try:
            checkpoint = Checkpoint(folder)
            changed = checkpoint.hash != self.model_hash
        except (CheckpointError, OSError) as error:
            raise EngineError(f"the model in {folder} is damaged: {error}. Rebuild.") from None
        if changed:
            raise EngineError(f"the model in {folder} is not the one that was built (its hash differs). Rebuild.")
        return checkpoint


def _build(folder: Path) -> str:
    """The command that builds into a folder; of which model, the user knows."""
    return f"{program('build_engines.py')} --model MODEL --engine-dir {shlex.quote(str(folder))}"
