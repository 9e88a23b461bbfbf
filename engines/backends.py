"""The backends: what each builds, in which precisions, and what runs it.

:data:`BACKENDS` is the one table of them. It names the functions that build and the modules that run by their path, and
they are imported when they are used: a backend's package takes seconds to import, and may not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from qwen2vl_trt.errors import BuildError, EngineError, MissingDependencyError, pip_install, reason, require

from .options import BackendOptions, TensorRTLLMOptions, TensorRTOptions
from .precision import (
    BF16,
    FP8,
    FP8_DECODER,
    FP8_IN_FP32,
    FP16_DECODER,
    FP16_REFUSED,
    FP32,
    INT4,
    INT4_IN_FP32,
    INT8,
    INT8_IN_FP32,
    NVFP4,
    NVFP4_IN_FP32,
    SINCE,
    Precision,
    bf16_slowdown,
    cpu_precision,
)
from .profile import BuildProfile

if TYPE_CHECKING:
    from qwen2vl_trt.checkpoint import Checkpoint

    from .progress import BuildSteps


@dataclass(frozen=True)
class BuildJob:
    """One build: its files are written into ``folder``, which is empty, and are for ``engine_dir``."""

    backend: Backend
    checkpoint: Checkpoint
    folder: Path
    engine_dir: Path
    precision: Precision
    profile: BuildProfile
    on_step: BuildSteps


@dataclass(frozen=True)
class Backend:
    """One way to build and run a model.

    Attributes:
        name: as ``--backend`` takes it.
        precisions: what it can be built in; the first is the default.
        package: that builds and runs the engines.
        builder: ``module:function``, from a :class:`BuildJob` to the files that it made (not the checkpoint's).
        runner: module with ``default_device``, ``load_vision`` and ``load_decoder``, see
            :class:`qwen2vl_trt.runtime.backends.runners.RunnerModule`.
        oldest: first release of the package that works.
        below: first major release that is not known to work.
        hint: ends the message that the package is missing or too old.
        extra: of this project, which installs the package; empty where it is a dependency.
        check: ``module:function`` that raises where the imported package lacks what is used of it.
        steps: that a build reports.
        options: of this backend alone; None where it has none.
        plans: its graphs are built to TensorRT plans, with optimisation profiles and a cache of fixed length.
        bound_to: the package whose engines run in the release alone that built them; None where any runs them.
        builds_anywhere: plans are built without a GPU, for the compute capabilities that are named.
        measures_cpu: on a CPU the default precision is measured.
        cpu_weights: as what a CPU holds the weights; None where the backend runs on none.
    """

    name: str
    precisions: tuple[Precision, ...]
    package: str
    builder: str
    runner: str
    oldest: tuple[int, int] = (0, 0)
    below: int | None = None
    hint: str = ""
    extra: str = ""
    check: str = ""
    steps: int = 3
    options: BackendOptions | None = None
    plans: bool = False
    bound_to: str | None = None
    builds_anywhere: bool = False
    measures_cpu: bool = False
    cpu_weights: Literal["as built", "fp32"] | None = None

    def measures(self, device: str | None) -> bool:
        """Whether the default precision for a device (by default a GPU where torch sees one) must be measured."""
        if not self.measures_cpu or device is not None:
            return self.measures_cpu and device == "cpu"
        import torch

        return not torch.cuda.is_available()

    def default_precision(self, device: str | None, stored: str | None = None) -> Precision:
        """What to build in unless told.

        Args:
            device: by default a GPU where torch sees one.
            stored: what the checkpoint holds its weights in (:func:`qwen2vl_trt.quantization.stored_weights`); taken
                where the backend computes in it; TensorRT in NVFP4 on a GPU alone that has its products.
        """
        kept = next((each for each in self.precisions if stored and each.weights == stored), None)
        if kept is not None and kept.weights == "nvfp4" and self.plans and not _has_fp4():
            kept = None
        return kept or (cpu_precision() if self.measures(device) else self.precisions[0])

    def precision(self, name: str) -> Precision:
        """One of the precisions, by its name; raises BuildError for another, naming those that there are."""
        for precision in self.precisions:
            if precision.name == name:
                return precision
        if name == "fp16":
            raise BuildError(FP16_REFUSED)
        known = [precision.name for precision in self.precisions]
        raise BuildError(f"backend {self.name} cannot be built in {name!r}, only in {', '.join(known)}")

    def with_options(self, values: Mapping[str, Any]) -> Backend:
        """This backend with some of its options changed; names that are no option are passed over.

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

    def load(self) -> Any:
        """Import the package and check its release.

        Raises:
            MissingDependencyError: it is not installed, or lacks its libraries.
            EngineError: the release does not work.
        """
        install = pip_install(self.extra)
        require(f"backend {self.name}", self.extra, {self.package: self.package}, self.hint)
        try:
            module = import_module(self.package)
        except Exception as error:  # TensorRT-LLM starts MPI and CUDA at import: anything can go wrong
            raise MissingDependencyError(
                f"backend {self.name} needs {self.package}, which cannot be imported ({reason(error)}): {install}"
            ) from None
        version = str(module.__version__)
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if numbers < self.oldest or (self.below is not None and numbers >= (self.below,)):
            older = f", older than {self.below}" if self.below is not None else ""
            oldest = ".".join(map(str, self.oldest))
            raise EngineError(
                f"backend {self.name} needs {self.package} {oldest} or later{older}; {version} is installed:"
                f" {install}{self.hint}"
            )
        if self.check:
            resolve_name(self.check)(module)
        return module

    def build(self, job: BuildJob) -> list[Path]:
        """Write an engine's files into the job's folder; returns those that it made."""
        return resolve_name(self.builder)(job)

    def versions(self) -> dict[str, str]:
        """Versions of what an engine depends on, asked of the packages: onnxruntime-gpu is onnxruntime too."""
        return {package: import_module(package).__version__ for package in dict.fromkeys(("torch", self.package))}


# TensorRT 10.15 and 10.16 have attention and cache layers, but no key_value_lengths and no CausalMaskKind.
TENSORRT = Backend(
    "tensorrt",
    (BF16, FP32, FP16_DECODER, FP8, INT4, NVFP4),
    "tensorrt",
    builder="qwen2vl_trt.engines.tensorrt_build:build_plans",
    runner="qwen2vl_trt.runtime.backends.tensorrt_runner",
    oldest=(11, 0),
    below=12,
    extra="tensorrt",
    steps=5,
    options=TensorRTOptions(),
    plans=True,
    bound_to="tensorrt",
)
TENSORRT_RTX = replace(
    TENSORRT,
    name="tensorrt-rtx",
    precisions=(*TENSORRT.precisions, INT8),
    package="tensorrt_rtx",
    oldest=(1, 7),
    below=2,
    extra="tensorrt-rtx",
    bound_to="tensorrt_rtx",
    builds_anywhere=True,
)
BACKENDS = {
    backend.name: backend
    for backend in (
        # ONNX Runtime has no BF16 or FP16 matrix product on the CPU: it computes in FP32 from the weights' type.
        Backend(
            "onnxruntime",
            (FP32, FP8_IN_FP32, INT4_IN_FP32, INT8_IN_FP32, NVFP4_IN_FP32),
            "onnxruntime",
            builder="qwen2vl_trt.engines.builders:build_onnxruntime",
            runner="qwen2vl_trt.runtime.backends.onnxruntime_runner",
            # Before, the mask of a causal Attention lies in the upper-left corner: a second chunk of a prompt sees few
            # of its keys.
            oldest=(1, 28),
            hint=" (on Python 3.11 or newer; older releases answer wrongly), or --backend torch",
            cpu_weights="fp32",
        ),
        Backend(
            "torch",
            (BF16, FP32, FP16_DECODER, FP8, INT8, INT4, NVFP4),
            "torch",
            builder="qwen2vl_trt.engines.builders:build_torch",
            runner="qwen2vl_trt.runtime.backends.torch_runner",
            steps=1,
            measures_cpu=True,
            cpu_weights="as built",
        ),
        TENSORRT,
        TENSORRT_RTX,
        Backend(
            "tensorrt-llm",
            (BF16, FP8_DECODER),
            "tensorrt_llm",
            builder="qwen2vl_trt.engines.builders:build_tensorrt_llm",
            runner="qwen2vl_trt.runtime.tensorrt_llm.runner",
            oldest=(1, 2),
            below=2,
            extra="tensorrt-llm",
            check="qwen2vl_trt.engines.tensorrt_llm_api:check_api",
            steps=1,
            options=TensorRTLLMOptions(),
            plans=True,
        ),
    )
}


def _has_fp4() -> bool:
    """Whether torch sees a GPU with products of FP4: Blackwell and newer."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= SINCE["nvfp4"]


def default_backend(device: str | None = None, precision: str | None = None, stored: str | None = None) -> str:
    """The fastest backend of a device, of those that have the precision.

    On a GPU TensorRT where it is installed, else torch: ONNX Runtime needs another package there, and its cache is not
    paged. On a CPU ONNX Runtime where Python has it; but torch where the CPU multiplies faster in BF16 than in FP32 and
    ONNX Runtime would multiply in FP32.

    Args:
        device: by default a GPU where torch sees one.
        precision: None where none is asked for.
        stored: see :meth:`Backend.default_precision`.
    """
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    first = "tensorrt" if device.startswith("cuda") else "onnxruntime"
    if first == "onnxruntime" and (precision or stored) in (None, "fp8") and bf16_slowdown() < 1:
        first = "torch"
    has_it = precision is None or any(each.name == precision for each in BACKENDS[first].precisions)
    return first if has_it and find_spec(first) else "torch"


def load_backend(name: str, precision: str | None = None) -> Backend:
    """Look up a backend whose package works, and which has the precision.

    Raises:
        BuildError: unknown, or not a combination that works; the message names those that do.
        EngineError, MissingDependencyError: see :meth:`Backend.load`.
    """
    if name not in BACKENDS:
        raise BuildError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    if precision is not None:
        backend.precision(precision)
    backend.load()
    return backend


def find_backend(name: str, precision: str | None, device: str | None = None) -> tuple[Backend, str]:
    """:func:`load_backend` and the precision to build in; without one, the default for the device."""
    backend = load_backend(name, precision)
    return backend, precision or backend.default_precision(device).name
