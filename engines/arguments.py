"""Command-line options that both commands share: which model, which backend, which limits, which folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.hub import TINY, ResolvedModel, published_name, resolve_model
from qwen2vl_trt.prompts import check_tokenizer_files

from .attention_mask import ATTENTION_MASKS
from .backends import BACKENDS, DEFAULT_BACKEND, Backend, find_backend
from .build import default_engine_dir, engines_in
from .command import folder_name, path_name
from .differences import differences, in_words
from .manifest import Manifest
from .precision import Precision
from .profile import BuildConfig, BuildProfile, flag
from .tensorrt_llm_options import VISION_BACKENDS, TensorRTLLMOptions
from .tensorrt_options import HARDWARE_COMPATIBILITY, TensorRTOptions

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CALIBRATION_SIZE = 512
_CALIBRATION = ("calibration_data", "calibration_size")
_TENSORRT = tuple(field.name for field in fields(TensorRTOptions))
_TENSORRT_LLM = tuple(field.name for field in fields(TensorRTLLMOptions))
_HELP = {
    "min_hw_dims": "fewest patches h*w of one image",
    "max_hw_dims": "most patches h*w of one image",
    "max_batch_size": "most images a vision call, most requests decoding together",
    "max_input_len": "most tokens of a prompt, image tokens included",
    "max_seq_len": "most tokens of a prompt and its answer",
}


@dataclass(frozen=True)
class CalibrationChoice:
    """What to quantise with, as far as the user says: a folder of images, and how many of them.

    Without a folder it is the model's own data, or what a checkpoint was quantised with that is there already.
    """

    folder: Path | None
    size: int | None


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and where.

    Attributes:
        calibration: where the model is to be quantised.
        force: replace other engines in the folder.
        kept: options, in words, that the engines in the folder were built with and nobody gave this time.
    """

    model: ResolvedModel
    backend: Backend
    precision: str
    profile: BuildProfile
    folder: Path
    calibration: CalibrationChoice | None = None
    force: bool = False
    kept: tuple[str, ...] = ()


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
    group.add_argument(
        "--precision", help=f"by default the backend's first (torch: fp32 on a CPU without bf16): {_precisions()}"
    )
    group.add_argument(
        "--engine-dir", type=folder_name, metavar="DIR", help="default artifacts/MODEL-BACKEND-PRECISION"
    )
    group.add_argument(
        "--config", type=path_name, metavar="YAML", help="model and limits from a file like configs/*.yaml"
    )
    group.add_argument("--force", action="store_true", help="build, and replace the engines that are in the folder")
    for name in BuildProfile.names():
        group.add_argument(flag(name), type=int, metavar="N", help=_HELP[name])
    fp8 = parser.add_argument_group("quantisation (--precision fp8 of a model that is not quantised)")
    fp8.add_argument(
        "--calibration-data",
        type=folder_name,
        metavar="DIR",
        help="images, and prompts.jsonl; tiny has its training images",
    )
    fp8.add_argument(
        "--calibration-size", type=int, metavar="N", help=f"most of them to take (default {CALIBRATION_SIZE})"
    )
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
    tensorrt.add_argument(
        "--attention-mask",
        metavar="KIND",
        help=f"{', '.join(ATTENTION_MASKS)} (default {ATTENTION_MASKS[0]}; see docs/design/tensorrt.md)",
    )
    tensorrt_llm = parser.add_argument_group("TensorRT-LLM")
    tensorrt_llm.add_argument("--tp-size", type=int, metavar="N", help="GPUs that share each layer (default 1)")
    tensorrt_llm.add_argument(
        "--max-num-tokens", type=int, metavar="N", help="most tokens a step (default 8192, or --max-input-len)"
    )
    tensorrt_llm.add_argument(
        "--vision-backend", metavar="NAME", help=f"of the vision engine: {', '.join(VISION_BACKENDS)} (default torch)"
    )


def built_folder(arguments: argparse.Namespace) -> Path | None:
    """The folder to run as it is: ``--engine-dir`` without a model. None where a model is to be built first.

    Raises:
        BuildError: an option that only a build can follow, or one that the engines in the folder were built without.
        EngineError: the folder holds no engines.
    """
    folder: Path | None = arguments.engine_dir
    if folder is None or arguments.model is not None or arguments.config:
        return None
    as_built = f"{folder} runs as it was built; name the --model to build again"
    for name in ("revision", *_CALIBRATION):
        if getattr(arguments, name) is not None:
            raise BuildError(f"{flag(name)} says how to build, but {as_built}")
    if arguments.force:
        raise BuildError(f"--force builds, but {as_built}")
    found = Manifest.read(folder)
    given = {name: getattr(arguments, name) or getattr(found, name) for name in ("backend", "precision")}
    wanted = replace(found, profile=replace(found.profile, **_given(arguments, BuildProfile.names())), **given)
    if _given(arguments, (*_TENSORRT, *_TENSORRT_LLM)) and given["backend"] in BACKENDS:
        options = _with_options(BACKENDS[given["backend"]], arguments, found).options
        wanted = replace(wanted, options=options.as_dict() if options else {})
    differing = differences(wanted, found)
    if differing:
        raise BuildError(f"{in_words(folder, differing)}. {as_built}")
    return folder


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that are given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _with_options(backend: Backend, arguments: argparse.Namespace, found: Manifest | None) -> Backend:
    """A backend with the options that are given, the others as the engines have them that are there."""
    given: dict[str, Any] = {}
    for names, kind, whose in (
        (_TENSORRT, TensorRTOptions, "the TensorRT backends"),
        (_TENSORRT_LLM, TensorRTLLMOptions, "backend tensorrt-llm"),
    ):
        of_kind = _given(arguments, names)
        if of_kind and not isinstance(backend.options, kind):
            raise BuildError(f"{flag(next(iter(of_kind)))} is for {whose}, not for {backend.name}")
        given |= of_kind
    there = found.options if found and found.backend == backend.name else {}
    return backend.with_options(there | given)


def _calibration(precision: Precision, arguments: argparse.Namespace) -> CalibrationChoice | None:
    if not precision.fp8:
        for name in _CALIBRATION:
            if getattr(arguments, name) is not None:
                raise BuildError(f"{flag(name)} is for --precision fp8, not for {precision.name}")
        return None
    size = arguments.calibration_size
    if size is not None and size < 1:
        raise BuildError(f"--calibration-size is {size}; it must be at least 1")
    return CalibrationChoice(arguments.calibration_data, size)


def _precisions() -> str:
    return "; ".join(
        f"{backend.name} {', '.join(precision.name for precision in backend.precisions)}"
        for backend in BACKENDS.values()
    )


def usual_profile(model: str | None) -> BuildProfile:
    """Limits of a model's own file in ``configs/``, however its name is spelt, or the defaults where it has none.

    Raises:
        BuildError: the file of a model that is known is missing or damaged.
    """
    published = published_name((model or "").replace("--", "/"))
    own = _CONFIGS / f"{published or model}.yaml"
    if not (published or model == TINY or own.is_file()):
        return BuildProfile()
    return BuildProfile.from_dict(BuildConfig.from_yaml(own).limits)


def plan_build(arguments: argparse.Namespace) -> BuildPlan:
    """Resolve the options: an option wins over ``--config``, and that over the model's own file in ``configs/``.

    What nobody gave is as in the engines that the folder holds already (so that they serve), and a default where it
    holds none or ``--force`` replaces them.

    Raises:
        BuildError: impossible limits, an unknown backend or precision, or an unreadable configuration.
        CheckpointError: the model cannot be found, is incomplete, is another than Qwen2.5-VL, or has no tokenizer or
            chat template.
    """
    config = BuildConfig.from_yaml(arguments.config) if arguments.config else None
    if config and arguments.model is not None and config.model != arguments.model:
        raise BuildError(f"--model {arguments.model} contradicts {arguments.config}, which is for {config.model}")
    device = getattr(arguments, "device", None)  # build_engines.py has no such option
    found = _engines_in(arguments.engine_dir, arguments.force)
    name = arguments.backend or (found.backend if found else DEFAULT_BACKEND)
    as_found = found.precision if found and found.backend == name else None
    backend, precision = find_backend(name, arguments.precision or as_found, device)
    wanted = config.model if config else arguments.model
    model = resolve_model("tiny" if wanted is None else wanted, arguments.revision)
    Checkpoint(model.folder)
    check_tokenizer_files(model.folder)  # here, before the minutes of a build whose engines no pipeline could load
    folder = arguments.engine_dir or default_engine_dir(model.name, backend.name, precision)
    if arguments.engine_dir is None:
        found = _engines_in(folder, arguments.force)
    fresh = usual_profile(model.name).as_dict() if config is None else {}
    given = (config.limits if config else {}) | _given(arguments, BuildProfile.names())
    profile = BuildProfile.from_dict((found.profile.as_dict() if found else fresh) | given)
    defaults, kept = BuildProfile().as_dict() | fresh | given, profile.as_dict()
    return BuildPlan(
        model,
        _with_options(backend, arguments, found),
        precision,
        profile,
        folder,
        _calibration(backend.precision(precision), arguments),
        arguments.force,
        tuple(f"{flag(limit)} {kept[limit]}" for limit in kept if kept[limit] != defaults[limit]),
    )


def _engines_in(folder: Path | None, force: bool) -> Manifest | None:
    return None if folder is None or force else engines_in(folder)
