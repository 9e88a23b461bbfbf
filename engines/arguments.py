"""Command-line options that both commands share: which model, which backend, which limits, which folder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.hub import ResolvedModel, resolve_model
from qwen2vl_trt.prompts import check_tokenizer_files

from .attention_mask import ATTENTION_MASKS
from .backends import BACKENDS, DEFAULT_BACKEND, Backend, find_backend
from .build import default_engine_dir
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
    """What to quantise with: a folder of images (None: the model's own data) and how many of them."""

    folder: Path | None
    size: int


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and where; ``calibration`` where it is to be quantised."""

    model: ResolvedModel
    backend: Backend
    precision: str
    profile: BuildProfile
    folder: Path
    calibration: CalibrationChoice | None = None


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
    group.add_argument("--engine-dir", type=Path, metavar="DIR", help="default artifacts/MODEL-BACKEND-PRECISION")
    group.add_argument("--config", type=Path, metavar="YAML", help="model and limits from a file like configs/*.yaml")
    for name in BuildProfile.names():
        group.add_argument(flag(name), type=int, metavar="N", help=_HELP[name])
    fp8 = parser.add_argument_group("quantisation (--precision fp8 of a model that is not quantised)")
    fp8.add_argument(
        "--calibration-data", type=Path, metavar="DIR", help="images, and prompts.jsonl; tiny has its training images"
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
        help=f"{', '.join(ATTENTION_MASKS)} (default {ATTENTION_MASKS[0]}; see docs/tensorrt.md)",
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
        BuildError: an option that only a build can follow.
    """
    if arguments.engine_dir is None or arguments.model or arguments.config:
        return None
    for name in ("revision", "backend", "precision", *BuildProfile.names(), *_CALIBRATION, *_TENSORRT, *_TENSORRT_LLM):
        if getattr(arguments, name) is not None:
            raise BuildError(
                f"{flag(name)} says how to build, but {arguments.engine_dir} runs as it was built; name the --model to"
                " build again"
            )
    return arguments.engine_dir


def _with_options(backend: Backend, arguments: argparse.Namespace) -> Backend:
    for names, options, whose in (
        (_TENSORRT, TensorRTOptions, "the TensorRT backends"),
        (_TENSORRT_LLM, TensorRTLLMOptions, "backend tensorrt-llm"),
    ):
        given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
        if given and not isinstance(backend.options, options):
            raise BuildError(f"{flag(next(iter(given)))} is for {whose}, not for {backend.name}")
        if "compute_capabilities" in given:
            given["compute_capabilities"] = tuple(given["compute_capabilities"])
        if given:
            backend = replace(backend, options=options(**given))
    return backend


def _calibration(precision: Precision, arguments: argparse.Namespace) -> CalibrationChoice | None:
    if not precision.fp8:
        for name in _CALIBRATION:
            if getattr(arguments, name) is not None:
                raise BuildError(f"{flag(name)} is for --precision fp8, not for {precision.name}")
        return None
    size = CALIBRATION_SIZE if arguments.calibration_size is None else arguments.calibration_size
    if size < 1:
        raise BuildError(f"--calibration-size is {size}; it must be at least 1")
    return CalibrationChoice(arguments.calibration_data, size)


def _precisions() -> str:
    return "; ".join(
        f"{backend.name} {', '.join(precision.name for precision in backend.precisions)}"
        for backend in BACKENDS.values()
    )


def usual_profile(model: str) -> BuildProfile:
    """Limits of a model's own file in ``configs/``, or the defaults where it has none."""
    own = _CONFIGS / f"{model}.yaml"
    return BuildConfig.from_yaml(own).profile if own.is_file() else BuildProfile()


def plan_build(arguments: argparse.Namespace) -> BuildPlan:
    """Resolve the options: an option wins over ``--config``, and that over the model's own file in ``configs/``.

    Raises:
        BuildError: impossible limits, an unknown backend or precision, or an unreadable configuration.
        CheckpointError: the model cannot be found, is another than Qwen2.5-VL, or has no tokenizer or chat template.
    """
    config = BuildConfig.from_yaml(arguments.config) if arguments.config else None
    if config and arguments.model and config.model != arguments.model:
        raise BuildError(f"--model {arguments.model} contradicts {arguments.config}, which is for {config.model}")
    device = getattr(arguments, "device", None)  # build_engines.py has no such option
    backend, precision = find_backend(arguments.backend or DEFAULT_BACKEND, arguments.precision, device)
    backend = _with_options(backend, arguments)
    model = resolve_model(config.model if config else arguments.model or "tiny", arguments.revision)
    Qwen2VLConfig.from_folder(model.folder)
    check_tokenizer_files(model.folder)  # here, before the minutes of a build whose engines no pipeline could load
    limits = (config.profile if config else usual_profile(model.name)).as_dict()
    limits |= {name: value for name in BuildProfile.names() if (value := getattr(arguments, name)) is not None}
    folder = arguments.engine_dir or default_engine_dir(model.name, backend.name, precision)
    calibration = _calibration(backend.precision(precision), arguments)
    return BuildPlan(model, backend, precision, BuildProfile.from_dict(limits), folder, calibration)
