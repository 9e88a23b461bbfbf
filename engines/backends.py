"""The backends that engines can be built for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, MissingDependencyError

from .profile import BuildProfile
from .progress import BuildSteps
from .tensorrt_module import TENSORRT, TENSORRT_RTX, Variant, load_tensorrt
from .tensorrt_options import TensorRTOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BuildJob:
    """One build: a model, the folder that gets its engines, how, and whom to tell of its progress."""

    checkpoint: Checkpoint
    folder: Path
    precision: str
    profile: BuildProfile
    options: TensorRTOptions | None
    steps: BuildSteps


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        name: as ``--backend`` takes it.
        precisions: what it can be built in; the first is the default.
        packages: whose versions an engine depends on.
        build: writes an engine's files into a folder and returns those that it made (not the checkpoint's).
        steps: that it reports.
        extra: of this project, which installs the packages.
        check: raises where the packages are there and yet cannot be used.
        options: of this backend alone; None where it has none.
    """

    name: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    build: Callable[[BuildJob], list[Path]]
    steps: int = 3
    extra: str | None = None
    check: Callable[[], object] = lambda: None
    options: TensorRTOptions | None = None

    def versions(self) -> dict[str, str]:
        """Installed versions of the packages, asked of themselves: onnxruntime-gpu is onnxruntime too."""
        return {package: import_module(package).__version__ for package in self.packages}


def _build_torch(job: BuildJob) -> list[Path]:
    """The torch engine is the checkpoint itself; the limits are kept so that every backend refuses the same."""
    from export.graphs import decoder_graph, vision_graph  # export takes seconds to import and is needed here alone
    from export.onnx_model import check_fit
    from export.weights import link_checkpoint

    config, dtype = job.checkpoint.config, DTYPES[job.precision]
    check_fit(job.checkpoint, [graph(config, dtype) for graph in (vision_graph, decoder_graph)])
    job.steps("linking weights")
    link_checkpoint(job.checkpoint, job.folder)
    return []


def _build_onnxruntime(job: BuildJob) -> list[Path]:
    """The two graphs as they are; the cache's capacity stays dynamic, see :func:`export.graphs.decoder_graph`."""
    from export.onnx_model import export_onnx

    return export_onnx(job.checkpoint, job.folder, DTYPES[job.precision], on_step=job.steps)


def _tensorrt(variant: Variant) -> Backend:
    def build(job: BuildJob) -> list[Path]:
        from .tensorrt_build import build_plans

        dtype, options = DTYPES[job.precision], job.options or TensorRTOptions()
        return build_plans(variant, job.checkpoint, job.folder, dtype, job.profile, job.steps, options)

    return Backend(
        variant.backend,
        ("bf16", "fp32"),
        ("torch", variant.module),
        build,
        steps=5,
        extra=variant.backend,
        check=lambda: load_tensorrt(variant),
        options=TensorRTOptions(),
    )


BACKENDS = {
    backend.name: backend
    for backend in (
        # ONNX Runtime has no BF16 matrix product on the CPU: it computes in FP32 from BF16 weights.
        Backend("onnxruntime", ("fp32",), ("torch", "onnxruntime"), _build_onnxruntime),
        Backend("torch", ("bf16", "fp32"), ("torch",), _build_torch, steps=1),
        _tensorrt(TENSORRT),
        _tensorrt(TENSORRT_RTX),
    )
}
DEFAULT_BACKEND = "onnxruntime" if find_spec("onnxruntime") else "torch"


def find_backend(name: str, precision: str | None) -> tuple[Backend, str]:
    """Look up a backend and the precision to build it in.

    Raises:
        BuildError: unknown, or not a combination that works; the message names those that do. Or its package is of a
            release that does not work.
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
    precision = precision or backend.precisions[0]
    if precision == "fp16":
        raise BuildError(
            "precision 'fp16' is for no backend: the SwiGLU of this vision tower overflows it; bf16 is as small and as"
            " fast"
        )
    if precision not in backend.precisions:
        raise BuildError(f"backend {name} cannot be built in {precision!r}, only in {' or '.join(backend.precisions)}")
    backend.check()
    return backend, precision
