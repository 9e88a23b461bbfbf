"""The backends that engines can be built for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, MissingDependencyError
from qwen2vl_trt.quantization import fp8_layers

from .cpu_precision import cpu_precision
from .onnxruntime_version import check_onnxruntime
from .precision import BF16, FP8, FP8_DECODER, FP8_IN_FP32, FP16_DECODER, FP16_REFUSED, FP32, Precision
from .profile import BuildProfile
from .progress import BuildSteps
from .tensorrt_llm_api import EMBEDDINGS, MODULE, load_tensorrt_llm, vision_input
from .tensorrt_llm_options import TensorRTLLMOptions
from .tensorrt_module import TENSORRT, TENSORRT_RTX, Variant, load_tensorrt
from .tensorrt_options import TensorRTOptions

_FP8_SINCE = (8, 9)


@dataclass(frozen=True)
class BuildJob:
    """One build: a model, how, and whom to tell of its progress.

    Attributes:
        folder: that the files are written into; empty.
        engine_dir: that they are for.
    """

    checkpoint: Checkpoint
    folder: Path
    engine_dir: Path
    precision: Precision
    profile: BuildProfile
    options: TensorRTOptions | TensorRTLLMOptions | None
    steps: BuildSteps


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        name: as ``--backend`` takes it.
        precisions: what it can be built in; the first is the default, but for ``on_cpu``.
        packages: whose versions an engine depends on.
        build: writes an engine's files into a folder and returns those that it made (not the checkpoint's).
        steps: that it reports.
        extra: of this project, which installs the packages.
        check: raises where the packages are there and yet cannot be used.
        options: of this backend alone; None where it has none.
        on_cpu: chooses the default where the engines are to run on a CPU.
        bound_to: the package whose engines run in the release alone that built them; None where any runs them.
    """

    name: str
    precisions: tuple[Precision, ...]
    packages: tuple[str, ...]
    build: Callable[[BuildJob], list[Path]]
    steps: int = 3
    extra: str | None = None
    check: Callable[[], object] = lambda: None
    options: TensorRTOptions | TensorRTLLMOptions | None = None
    bound_to: str | None = None
    on_cpu: Callable[[], Precision] | None = None

    def default_precision(self, device: str | None) -> Precision:
        """What to build in unless told, for a device (by default a GPU where torch sees one)."""
        if self.on_cpu and (device == "cpu" or (device is None and not torch.cuda.is_available())):
            return self.on_cpu()
        return self.precisions[0]

    def precision(self, name: str) -> Precision:
        """One of the precisions, by its name.

        Raises:
            BuildError: none of them; the message names those that are.
        """
        for precision in self.precisions:
            if precision.name == name:
                return precision
        if name == "fp16":
            raise BuildError(FP16_REFUSED)
        known = [precision.name for precision in self.precisions]
        raise BuildError(f"backend {self.name} cannot be built in {name!r}, only in {', '.join(known)}")

    def with_options(self, values: Mapping[str, Any]) -> Backend:
        """This backend with some of its options changed; names that are no option are passed over.

        Args:
            values: from a command line or a manifest.

        Raises:
            BuildError: a value without meaning.
        """
        if self.options is None:
            return self
        known = {field.name for field in fields(self.options)}
        changes: Any = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known
        }
        try:
            options = replace(self.options, **changes)
        except TypeError as error:
            raise BuildError(f"options of backend {self.name} are of a wrong type: {error}") from None
        return replace(self, options=options)

    def versions(self) -> dict[str, str]:
        """Installed versions of the packages, asked of themselves: onnxruntime-gpu is onnxruntime too."""
        return {package: import_module(package).__version__ for package in self.packages}


def _build_torch(job: BuildJob) -> list[Path]:
    """The torch engine is the checkpoint itself; the limits are kept so that every backend refuses the same."""
    from qwen2vl_trt.export.onnx_model import (  # export takes seconds to import and is needed here alone
        check_fit,
        model_graphs,
    )
    from qwen2vl_trt.export.weights import link_checkpoint

    check_fit(job.checkpoint, model_graphs(job.checkpoint, job.precision.vision, job.precision.decoder))
    job.steps("linking weights")
    link_checkpoint(job.checkpoint, job.folder)
    return []


def _build_onnxruntime(job: BuildJob) -> list[Path]:
    """The two graphs as they are; the capacity of the cache stays dynamic (``export.graphs.decoder_graph``)."""
    from qwen2vl_trt.export.onnx_model import export_onnx

    return export_onnx(job.checkpoint, job.folder, job.precision.vision, on_step=job.steps)


def _check_fp8_hardware(options: TensorRTOptions) -> None:
    """Refuse GPUs without FP8 here: TensorRT would after minutes, in its own words."""
    wanted = list(options.compute_capabilities)
    if not wanted and torch.cuda.is_available():
        wanted = [".".join(map(str, torch.cuda.get_device_capability()))]
    for capability in wanted:
        if tuple(map(int, capability.split("."))) < _FP8_SINCE:
            raise BuildError(
                f"FP8 needs a GPU of compute capability {'.'.join(map(str, _FP8_SINCE))} or newer (Ada, Hopper,"
                f" Blackwell), not {capability}; --precision bf16 needs 8.0"
            )
    if options.hardware_compatibility == "ampere_plus":
        raise BuildError("--hardware-compatibility ampere_plus includes GPUs without FP8: same_compute_capability")


def _tensorrt(variant: Variant) -> Backend:
    def build(job: BuildJob) -> list[Path]:
        from .tensorrt_build import build_plans

        options = job.options if isinstance(job.options, TensorRTOptions) else TensorRTOptions()
        if job.precision.fp8:
            _check_fp8_hardware(options)
        return build_plans(
            variant,
            job.checkpoint,
            job.folder,
            job.precision,
            job.profile,
            job.steps,
            options,
            engine_dir=job.engine_dir,
        )

    return Backend(
        variant.backend,
        (BF16, FP32, FP16_DECODER, FP8),
        ("torch", variant.module),
        build,
        steps=5,
        extra=variant.backend,
        check=lambda: load_tensorrt(variant),
        options=TensorRTOptions(),
        bound_to=variant.module,
    )


def _build_tensorrt_llm(job: BuildJob) -> list[Path]:
    """TensorRT-LLM loads the checkpoint itself; ``check_fit`` asks its own weight mapper for the names."""
    options = job.options if isinstance(job.options, TensorRTLLMOptions) else TensorRTLLMOptions()
    options.check_model(job.checkpoint.config.text)
    options.tokens_per_step(job.profile)
    _build_torch(job)
    if options.vision_backend == "torch":
        return []
    if vision_input() != EMBEDDINGS:
        raise BuildError(
            f"--vision-backend {options.vision_backend} needs a TensorRT-LLM that takes embeddings; this one runs its"
            " own vision tower. Leave the option out, or install a release with PreprocessedInputs."
        )
    from .tensorrt_build import build_plans

    return build_plans(
        TENSORRT,
        job.checkpoint,
        job.folder,
        job.precision,
        job.profile,
        job.steps,
        TensorRTOptions(),
        engines=("vision",),
        engine_dir=job.engine_dir,
    )


BACKENDS = {
    backend.name: backend
    for backend in (
        # ONNX Runtime has no BF16 or FP16 matrix product on the CPU: it computes in FP32 from the weights' type.
        Backend(
            "onnxruntime",
            (FP32, FP8_IN_FP32),
            ("torch", "onnxruntime"),
            _build_onnxruntime,
            check=check_onnxruntime,
        ),
        Backend("torch", (BF16, FP32, FP16_DECODER, FP8), ("torch",), _build_torch, steps=1, on_cpu=cpu_precision),
        _tensorrt(TENSORRT),
        _tensorrt(TENSORRT_RTX),
        Backend(
            "tensorrt-llm",
            (BF16, FP8_DECODER),
            ("torch", MODULE),
            _build_tensorrt_llm,
            steps=1,
            extra="tensorrt-llm",
            check=load_tensorrt_llm,
            options=TensorRTLLMOptions(),
        ),
    )
}
DEFAULT_BACKEND = "onnxruntime" if find_spec("onnxruntime") else "torch"


def find_backend(name: str, precision: str | None, device: str | None = None) -> tuple[Backend, str]:
    """Look up a backend and the precision to build it in; without one, the default for the device.

    Raises:
        BuildError: unknown, or not a combination that works; the message names those that do. Or its package is of a
            release that does not work.
        EngineError: likewise, of ONNX Runtime.
        MissingDependencyError: its package is not installed.
    """
    if name not in BACKENDS:
        raise BuildError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    missing = [package for package in backend.packages if find_spec(package) is None]
    if missing and backend.extra:
        raise MissingDependencyError(
            f"backend {name} needs {missing[0]}, which is not installed: pip install 'qwen2vl-trt[{backend.extra}]'"
        )
    if missing:
        raise MissingDependencyError(
            f"backend {name} needs {missing[0]}, which is not installed (pip install {missing[0]}; ONNX Runtime has the"
            " operators for Python 3.11 and newer). --backend torch needs nothing more."
        )
    chosen = backend.precision(precision) if precision else backend.default_precision(device)
    backend.check()
    return backend, chosen.name


def check_quantization(checkpoint: Checkpoint, precision: Precision) -> None:
    """Refuse a model that is not of the precision's kind.

    Raises:
        BuildError: an unquantised model for FP8, or a quantised one for anything else.
        CheckpointError: a quantisation that is not supported.
    """
    layers = fp8_layers(checkpoint)
    quantised = bool(layers)
    if precision.fp8 and not quantised:
        raise BuildError(f"{checkpoint.folder} is not quantised; build_engines.py --precision fp8 does that first")
    if quantised and not precision.fp8:
        raise BuildError(
            f"{checkpoint.folder} is quantised to FP8 and cannot be built in {precision.name}: --precision fp8"
        )
    if quantised and not precision.fp8_vision and any(layer.startswith("visual.") for layer in layers):
        raise BuildError(
            f"{checkpoint.folder} has FP8 layers in its vision tower, where TensorRT-LLM takes none: give the"
            " unquantised checkpoint with --precision fp8, which quantises the decoder alone, or one like that"
        )
