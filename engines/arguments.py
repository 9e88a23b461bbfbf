"""Command-line options that both commands share: which model, which backend, which limits, which folder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.hub import ResolvedModel, resolve_model

from .backends import BACKENDS, DEFAULT_BACKEND, Backend, find_backend
from .build import default_engine_dir
from .profile import BuildConfig, BuildProfile, flag
from .tensorrt_options import HARDWARE_COMPATIBILITY, TensorRTOptions

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_TENSORRT = tuple(field.name for field in fields(TensorRTOptions))
_HELP = {
    "min_hw_dims": "fewest patches h*w of one image",
    "max_hw_dims": "most patches h*w of one image",
    "max_batch_size": "most images a vision call, most requests decoding together",
    "max_input_len": "most tokens of a prompt, image tokens included",
    "max_seq_len": "most tokens of a prompt and its answer",
}


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and where."""

    model: ResolvedModel
    backend: Backend
    precision: str
    profile: BuildProfile
    folder: Path


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`plan_build` reads."""
    group = parser.add_argument_group("model and engines")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="tiny (default), Qwen2.5-VL-{3B,7B,32B,72B}, a hub id Org/Name, or a checkpoint folder",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--backend", help=f"{', '.join(BACKENDS)} (default {DEFAULT_BACKEND})")
    group.add_argument("--precision", help="by default the backend's first: " + _precisions())
    group.add_argument("--engine-dir", type=Path, metavar="DIR", help="default artifacts/MODEL-BACKEND-PRECISION")
    group.add_argument("--config", type=Path, metavar="YAML", help="model and limits from a file like configs/*.yaml")
    for name in BuildProfile.names():
        group.add_argument(flag(name), type=int, metavar="N", help=_HELP[name])
    tensorrt = parser.add_argument_group("TensorRT")
    tensorrt.add_argument("--builder-optimization-level", type=int, metavar="N", help="0 (fast build) to 5")
    tensorrt.add_argument("--strip-weights", action="store_true", default=None, help="plans without weights (tensorrt)")
    tensorrt.add_argument("--weight-streaming", action="store_true", default=None, help="weights may stay on the host")
    tensorrt.add_argument(
        "--hardware-compatibility", metavar="LEVEL", help=f"{', '.join(HARDWARE_COMPATIBILITY)} (tensorrt)"
    )
    tensorrt.add_argument(
        "--compute-capabilities", nargs="+", metavar="CC", help="GPUs to build for: 8.9 12.0 (tensorrt-rtx)"
    )


def built_folder(arguments: argparse.Namespace) -> Path | None:
    """The folder to run as it is: ``--engine-dir`` without a model. None where a model is to be built first.

    Raises:
        BuildError: an option that only a build can follow.
    """
    if arguments.engine_dir is None or arguments.model or arguments.config:
        return None
    for name in ("revision", "backend", "precision", *BuildProfile.names(), *_TENSORRT):
        if getattr(arguments, name) is not None:
            raise BuildError(
                f"{flag(name)} says how to build, but {arguments.engine_dir} runs as it was built; name the --model to"
                " build again"
            )
    return arguments.engine_dir


def _with_options(backend: Backend, arguments: argparse.Namespace) -> Backend:
    given = {name: value for name in _TENSORRT if (value := getattr(arguments, name)) is not None}
    if not given:
        return backend
    if backend.options is None:
        raise BuildError(f"{flag(next(iter(given)))} is for the TensorRT backends, not for {backend.name}")
    if "compute_capabilities" in given:
        given["compute_capabilities"] = tuple(given["compute_capabilities"])
    return replace(backend, options=TensorRTOptions(**given))


def _precisions() -> str:
    return "; ".join(f"{backend.name} {', '.join(backend.precisions)}" for backend in BACKENDS.values())


def plan_build(arguments: argparse.Namespace) -> BuildPlan:
    """Resolve the options: an option wins over ``--config``, and that over the model's own file in ``configs/``.

    Raises:
        BuildError: impossible limits, an unknown backend or precision, or an unreadable configuration.
        CheckpointError: the model cannot be found.
    """
    config = BuildConfig.from_yaml(arguments.config) if arguments.config else None
    if config and arguments.model and config.model != arguments.model:
        raise BuildError(f"--model {arguments.model} contradicts {arguments.config}, which is for {config.model}")
    backend, precision = find_backend(arguments.backend or DEFAULT_BACKEND, arguments.precision)
    backend = _with_options(backend, arguments)
    model = resolve_model(config.model if config else arguments.model or "tiny", arguments.revision)
    own = _CONFIGS / f"{model.name}.yaml"
    if config is None and own.is_file():
        config = BuildConfig.from_yaml(own)
    limits = config.profile.as_dict() if config else {}
    limits |= {name: value for name in BuildProfile.names() if (value := getattr(arguments, name)) is not None}
    folder = arguments.engine_dir or default_engine_dir(model.name, backend.name, precision)
    return BuildPlan(model, backend, precision, BuildProfile.from_dict(limits), folder)
