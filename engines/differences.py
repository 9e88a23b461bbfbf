"""In what the engines of a folder differ from those that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .backends import BACKENDS
from .manifest import Manifest
from .profile import flag


def differences(wanted: Manifest, found: Manifest) -> list[str]:
    """What a build would have to change, option by option, as found and as wanted; empty where nothing.

    Names of models do not count, nor do the versions of packages, but for those whose engines run in their own release
    alone.
    """
    pairs: list[tuple[str, Any, Any]] = [("--backend", found.backend, wanted.backend)]
    if found.model_hash != wanted.model_hash:
        pairs.append(("--model", _model(found), _model(wanted)))
    if found.backend == wanted.backend:
        pairs.append(("--precision", found.precision, wanted.precision))
        for name in sorted({*found.options, *wanted.options}):
            label = flag(name) if name != "vision" else "TensorRT-LLM's input"  # read off the release, no option
            pairs.append((label, _value(found.options.get(name)), _value(wanted.options.get(name))))
        package = BACKENDS[wanted.backend].bound_to if wanted.backend in BACKENDS else None
        if package:
            pairs.append((package, found.versions.get(package), wanted.versions.get(package)))
    limits = found.profile.as_dict(), wanted.profile.as_dict()
    pairs += [(flag(name), limits[0][name], limits[1][name]) for name in limits[0]]
    return [f"{option} {there} there, {asked} wanted" for option, there, asked in pairs if there != asked]


def in_words(folder: Path, differing: list[str]) -> str:
    """What is said of a folder with other engines than those that are asked for."""
    return f"{folder} holds other engines: {'; '.join(differing)}"


def _model(manifest: Manifest) -> str:
    return f"{manifest.model} ({manifest.model_hash[:12]})"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "default" if value is None else str(value)
