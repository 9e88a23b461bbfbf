"""What is to be built, and where: what the user says, completed by the engines that are there and by defaults."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS, Backend, default_backend, load_backend
from qwen2vl_trt.engines.build import default_engine_dir, differences, engines_in, in_words
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.options import TensorRTLLMOptions, TensorRTOptions
from qwen2vl_trt.engines.precision import BF16, FP32, QUANT_METHODS, Precision, bf16_slowdown
from qwen2vl_trt.engines.profile import BuildConfig, BuildProfile, flag, usual_profile
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.hub import TINY, ResolvedModel, resolve_model
from qwen2vl_trt.lora import Adapter
from qwen2vl_trt.quantization import stored_weights
from qwen2vl_trt.tokenizer import check_tokenizer_files

_OPTIONS = (
    ([each.name for each in fields(TensorRTOptions)], TensorRTOptions, "the TensorRT backends"),
    ([each.name for each in fields(TensorRTLLMOptions)], TensorRTLLMOptions, "backend tensorrt-llm"),
)
_SETTINGS = [*BuildProfile.names(), *(name for names, _, _ in _OPTIONS for name in names)]


@dataclass(frozen=True)
class BuildRequest:
    """What a user says; None leaves it to the engines that are there, or to a default.

    Attributes:
        model: see :func:`qwen2vl_trt.hub.resolve_model`.
        revision: of a hub model.
        lora: folder of a LoRA adapter in PEFT's layout, to merge into the model.
        backend: a name of :data:`qwen2vl_trt.engines.backends.BACKENDS`.
        precision: one of the backend's.
        engine_dir: where the engines are, or go to.
        config: a file like those of ``configs/``.
        force: replace other engines in the folder.
        device: that the engines are to run on.
        calibration_data: a folder of images to quantise with; without one the model's own data, or what a checkpoint
            was quantised with that is there already.
        calibration_size: most of them to take.
        quant_method: one of :data:`qwen2vl_trt.engines.precision.QUANT_METHODS`, for precision ``int4``; without one
            that of a checkpoint that is there already, or the first.
        settings: limits (:class:`~qwen2vl_trt.engines.profile.BuildProfile`) and options of a backend, by name.
    """

    model: str | Path | None = None
    revision: str | None = None
    lora: Path | None = None
    backend: str | None = None
    precision: str | None = None
    engine_dir: Path | None = None
    config: Path | None = None
    force: bool = False
    device: str | None = None
    calibration_data: Path | None = None
    calibration_size: int | None = None
    quant_method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Any]) -> BuildRequest:
        """From all of these by name, ``settings`` too.

        Raises:
            BuildError: a name that there is not.
        """
        own = [each.name for each in fields(cls) if each.name != "settings"]
        unknown = given.keys() - {*own, *_SETTINGS}
        if unknown:
            raise BuildError(f"unknown option {min(unknown)!r} of a build; known: {', '.join((*own, *_SETTINGS))}")
        settings = {name: given[name] for name in _SETTINGS if name in given}
        paths = ("engine_dir", "config", "calibration_data", "lora")
        given = given | {name: Path(given[name]) for name in paths if given.get(name) is not None}
        return cls(**{name: given[name] for name in own if name in given}, settings=settings)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> BuildRequest:
        """The options of a command."""
        known = {*_SETTINGS, *(each.name for each in fields(cls))}
        return cls.of({name: value for name, value in vars(arguments).items() if name in known})

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """The settings of these names that are given."""
        return {name: self.settings[name] for name in names if self.settings.get(name) is not None}


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and where.

    Attributes:
        request: what was asked for.
        adapter: to merge into the model.
        kept: limits, in words, that the engines in the folder were built with and nobody gave this time.
    """

    request: BuildRequest
    model: ResolvedModel
    backend: Backend
    precision: str
    profile: BuildProfile
    folder: Path
    kept: tuple[str, ...] = ()
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """Of the model with its adapter, for folders."""
        return _name(self.model, self.adapter)


def built_folder(request: BuildRequest) -> Path | None:
    """The folder to run as it is: ``--engine-dir`` without a model. None where a model is to be built first.

    Raises:
        BuildError: an option that only a build can follow, or one that the engines in the folder were built without.
        EngineError: the folder holds no engines.
    """
    folder = request.engine_dir
    if folder is None or request.model is not None or request.config:
        return None
    as_built = f"{folder} runs as it was built; name the --model to build again"
    for name in ("revision", "lora", "calibration_data", "calibration_size", "quant_method"):
        if getattr(request, name) is not None:
            raise BuildError(f"{flag(name)} says how to build, but {as_built}")
    if request.force:
        raise BuildError(f"--force builds, but {as_built}")
    found = Manifest.read(folder)
    wanted = replace(
        found,
        backend=request.backend or found.backend,
        precision=request.precision or found.precision,
        profile=replace(found.profile, **request.given(BuildProfile.names())),
    )
    if wanted.backend in BACKENDS and any(request.given(names) for names, _, _ in _OPTIONS):
        options = _with_options(BACKENDS[wanted.backend], request, found).options
        wanted = replace(wanted, options=options.as_dict() if options else {})
    differing = differences(wanted, found)
    if differing:
        raise BuildError(f"{in_words(folder, differing)}. {as_built}")
    return folder


def plan_build(request: BuildRequest) -> BuildPlan:
    """Complete a request: what it says wins over its ``config``, and that over the model's own file in ``configs/``.

    What nobody gave is as in the engines that the folder holds already (so that they serve), and a default where it
    holds none or ``force`` replaces them.

    Raises:
        BuildError: impossible limits, an unknown backend or precision, or an unreadable configuration.
        CheckpointError: the model cannot be found, is incomplete, is another than Qwen2.5-VL, or has no tokenizer or
            chat template; the adapter is none, or does not fit it.
        EngineError, MissingDependencyError: the backend's package does not work, or is not there.
    """
    config = BuildConfig.from_yaml(request.config) if request.config else None
    if config and request.model is not None and config.model != request.model:
        raise BuildError(f"--model {request.model} contradicts {request.config}, which is for {config.model}")
    found = _engines_in(request.engine_dir, request.force)
    name = request.backend or (found.backend if found else None)
    wanted = request.precision or (found.precision if found and found.backend == name else None)
    asked = config.model if config else request.model
    adapter = Adapter.read(request.lora) if request.lora else None
    load_backend(name or default_backend(request.device, wanted), wanted)  # before a download
    model = resolve_model(TINY if asked is None else asked, request.revision)
    checkpoint = Checkpoint(model.folder)
    stored = stored_weights(checkpoint) if wanted is None else None
    backend = load_backend(name or default_backend(request.device, wanted, stored), wanted)
    if wanted is stored is None and not request.force and request.engine_dir is None:
        wanted = _measured_before(_name(model, adapter), backend, request.device)
    precision = wanted or backend.default_precision(request.device, stored).name
    if adapter is not None:
        adapter.changes(checkpoint)
    check_tokenizer_files(model.folder)  # here, before the minutes of a build whose engines no pipeline could load
    folder = request.engine_dir or default_engine_dir(_name(model, adapter), backend.name, precision)
    if request.engine_dir is None:
        found = _engines_in(folder, request.force)
    fresh = usual_profile(model.name).as_dict() if config is None else {}
    given = (config.limits if config else {}) | request.given(BuildProfile.names())
    profile = BuildProfile.from_dict((found.profile.as_dict() if found else fresh) | given)
    _check_quantization(backend.precision(precision), request)
    defaults, kept = BuildProfile().as_dict() | fresh | given, profile.as_dict()
    return BuildPlan(
        request,
        model,
        _with_options(backend, request, found),
        precision,
        profile,
        folder,
        tuple(f"{flag(limit)} {kept[limit]}" for limit in kept if kept[limit] != defaults[limit]),
        adapter,
    )


def _name(model: ResolvedModel, adapter: Adapter | None) -> str:
    return f"{model.name}-{adapter.name}" if adapter else model.name


def _measured_before(model: str, backend: Backend, device: str | None) -> str | None:
    """The precision of engines that are there already, on a CPU where measuring may decide either way."""
    if not backend.measures(device) or bf16_slowdown() < 1:
        return None
    there = [each.name for each in (BF16, FP32) if engines_in(default_engine_dir(model, backend.name, each.name))]
    return there[0] if len(there) == 1 else None


def _with_options(backend: Backend, request: BuildRequest, found: Manifest | None) -> Backend:
    """A backend with the options that are given, the others as the engines have them that are there."""
    given: dict[str, Any] = {}
    for names, kind, whose in _OPTIONS:
        of_kind = request.given(names)
        if of_kind and not isinstance(backend.options, kind):
            raise BuildError(f"{flag(next(iter(of_kind)))} is for {whose}, not for {backend.name}")
        given |= of_kind
    there = found.options if found and found.backend == backend.name else {}
    return backend.with_options(there | given)


def _check_quantization(precision: Precision, request: BuildRequest) -> None:
    method = request.quant_method
    if method is not None:
        if precision.weights != "int4":
            raise BuildError(f"--quant-method is for --precision int4, not for {precision.name}")
        if method not in QUANT_METHODS:
            raise BuildError(f"--quant-method is {method!r:.60}; known: {', '.join(QUANT_METHODS)}")
    calibrated = precision.fp8 or (precision.weights == "int4" and method != "rtn")
    for name in ("calibration_data", "calibration_size"):
        if getattr(request, name) is not None and not calibrated:
            given = f"--quant-method {method}" if method else precision.name
            raise BuildError(f"{flag(name)} is for --precision fp8 and int4 (--quant-method awq), not for {given}")
    size = request.calibration_size
    if size is not None and size < 1:
        raise BuildError(f"--calibration-size is {size}; it must be at least 1")


def _engines_in(folder: Path | None, force: bool) -> Manifest | None:
    return None if folder is None or force else engines_in(folder)
