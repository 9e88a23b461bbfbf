"""From a model to an engine folder that loads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from qwen2vl_trt import __version__
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, EngineError
from qwen2vl_trt.hub import ResolvedModel

from .backends import Backend, BuildJob, check_quantization
from .manifest import FILE, BuiltFile, Manifest
from .profile import BuildProfile
from .progress import BuildSteps, progress_bar

logger = logging.getLogger(__name__)

_LOCK = ".lock"
"""Stays in the folder, and so marks it as one that builds may clear."""


def build_engines(
    model: ResolvedModel, backend: Backend, precision: str, profile: BuildProfile, folder: Path, force: bool = False
) -> bool:
    """Build both engines of a model, unless the folder already holds the same.

    Args:
        model: see :func:`qwen2vl_trt.hub.resolve_model`.
        backend: with ``precision``, from :func:`engines.backends.find_backend`.
        precision: one of the backend's.
        profile: the limits.
        folder: where the engines go; made if missing. Files of an older build are replaced.
        force: build even if the folder holds the same.

    Returns:
        Whether anything was built.

    Raises:
        CheckpointError: the model cannot be read or does not fit its configuration.
        BuildError: the folder cannot be written, or holds a model that no build put there; the model is not of the
            precision's kind (quantised or not).
    """
    checkpoint = Checkpoint(model.folder)
    if folder.resolve() == model.folder.resolve():
        raise BuildError(f"{folder} is the checkpoint itself; give --engine-dir another folder")
    numbers = backend.precision(precision)
    check_quantization(checkpoint, numbers)
    planned = Manifest(
        model=model.name,
        model_hash=checkpoint.hash,
        backend=backend.name,
        precision=precision,
        profile=profile,
        files={},
        versions={"qwen2vl-trt": __version__, **backend.versions()},
        options=backend.options.as_dict() if backend.options else {},
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not force and _is_built(planned, folder):
            return False
        _check_ours(folder)
        with _alone(folder):  # two builds at once: the second waits, then finds the first one's work
            if not force and _is_built(planned, folder):
                return False
            (folder / FILE).unlink(missing_ok=True)
            with progress_bar() as progress:
                steps = BuildSteps(progress, model.name, backend.steps)
                files = backend.build(BuildJob(checkpoint, folder, numbers, profile, backend.options, steps))
            replace(planned, files={path.name: BuiltFile.of(path) for path in files}).write(folder)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror or error}; nothing that loads was left there") from None
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another build is at work there; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_ours(folder: Path) -> None:
    """A build clears its folder of older models: never one that is somebody's checkpoint."""
    from export.weights import MODEL_FILES

    if (folder / FILE).exists() or (folder / _LOCK).exists():
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILES:
            raise BuildError(f"{folder} holds {path.name}, which no build put there; give --engine-dir a new folder")


def _is_built(planned: Manifest, folder: Path) -> bool:
    try:
        found = Manifest.read(folder)
        if replace(found, files={}) != planned:
            return False
        found.verify(folder)
    except EngineError:
        return False
    return True


def default_engine_dir(model: str, backend: str, precision: str) -> Path:
    """Where engines land unless told otherwise, from the current folder."""
    return Path("artifacts") / f"{model}-{backend}-{precision}"
