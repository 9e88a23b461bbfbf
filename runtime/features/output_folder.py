"""A folder that a command fills run after run: one run at a time, all with the settings of the first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.errors import FeaturesError, reason
from qwen2vl_trt.files import atomic_write

from ..options import PipelineOptions
from ..preprocessing.settings import PreprocessorSettings

IfExists = Literal["refuse", "resume", "overwrite"]

SETTINGS = "settings.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class OutputFolder:
    """Where a command writes.

    Attributes:
        path: the folder, made if it is missing.
        if_exists: what to do where an earlier run has saved something; to resume where none has is a new run.
        saved: glob of what shows that a run has.
        parts: globs of all that a run writes besides its settings.
    """

    path: Path
    if_exists: IfExists
    saved: str
    parts: tuple[str, ...]

    @property
    def in_use(self) -> bool:
        """Whether a run, ended or not, has saved something here."""
        return any(self.path.glob(self.saved))

    def check(self) -> None:
        """See before the work whether the folder can be written.

        Raises:
            FeaturesError: it is a file or read-only, the folder above is missing, or an earlier run is in the way.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FeaturesError(f"{self.path} is a file; name a folder")
        check_writable(self.path)
        if self.if_exists == "refuse" and self.in_use:
            raise FeaturesError(in_the_way(self.path))

    @contextmanager
    def open(self, settings: dict[str, Any], start: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Have the folder for one run; no other can while it lasts.

        Args:
            settings: what the results depend on, by name, as JSON has it. A resumed run must have the same.
            start: called where a run begins, in an empty folder, before the settings are there.

        Raises:
            FeaturesError: an earlier run is in the way, its settings differ, another run is at work, or the folder
                cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise FeaturesError(
                    f"{self.path}: another run is writing there; wait for it, or give another --output"
                ) from None
        try:
            self.check()
            with writing(self.path):
                for leftover in self.path.glob(".*.tmp"):  # of a run that was killed
                    leftover.unlink()
                if self.if_exists == "overwrite" or not self.in_use:
                    self._clear()
                    start()
                    atomic_write(self.path / SETTINGS, json.dumps(settings, indent=2).encode())
            self._check_settings(settings)
            yield
        finally:
            lock.release()

    def _clear(self) -> None:
        """Remove a run's files, and no other."""
        for pattern in (SETTINGS, *self.parts):
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        try:
            found = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no object")
        except (OSError, ValueError):
            raise FeaturesError(
                f"{self.path / SETTINGS} cannot be read, so the settings of the results there are unknown;"
                " --overwrite starts again"
            ) from None
        for name in sorted({*found, *settings}):
            if found.get(name) != settings.get(name):
                raise FeaturesError(
                    f"{self.path} was begun with {name} {found.get(name)!r}, this run has {settings.get(name)!r}; give"
                    " another --output, or --overwrite"
                )


def check_writable(path: Path) -> None:
    """See that a file or folder can be made or changed; raises FeaturesError."""
    if not path.parent.is_dir():
        raise FeaturesError(f"{path} cannot be written: there is no folder {path.parent}")
    target = path if path.is_dir() else path.parent
    if not os.access(target, os.W_OK):
        raise FeaturesError(f"{path} cannot be written: the folder {target} is read-only")


def in_the_way(output: Path) -> str:
    """The message where an earlier run's results are."""
    return f"{output} holds the output of an earlier run; --resume goes on with it, --overwrite starts again"


def common_settings(manifest: Manifest, options: PipelineOptions, preprocessor: PreprocessorSettings) -> dict[str, Any]:
    """What all results depend on, for :meth:`OutputFolder.open`."""
    return {
        "model": manifest.model,
        "model_hash": manifest.model_hash,
        "precision": manifest.precision,
        "min_pixels": preprocessor.image.min_pixels,
        "max_pixels": preprocessor.image.max_pixels,
        "image_pixel_limit": options.image_pixel_limit,
        "min_hw_dims": manifest.profile.min_hw_dims,
        "max_hw_dims": manifest.profile.max_hw_dims,
        "strict_size": options.strict_size,
        "decode": options.decode,
        "allow_special_tokens": options.allow_special_tokens,
        "chat_template": options.chat_template,
    }


@contextmanager
def writing(path: Path, way_out: str = "") -> Iterator[None]:
    """Turn an OSError into a FeaturesError that names the file and the way out."""
    try:
        yield
    except OSError as error:
        raise FeaturesError(f"{path} cannot be written: {reason(error)}{way_out}") from None
