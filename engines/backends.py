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

OnStep = Callable[[str], None]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Backend:
    """One way to run a model.

    Attributes:
        name: as ``--backend`` takes it.
        precisions: what it can be built in; the first is the default.
        packages: whose versions an engine depends on.
        build: writes an engine's files into a folder and returns those that it made (not the checkpoint's).
    """

    name: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    build: Callable[[Checkpoint, Path, str, BuildProfile, OnStep], list[Path]]

    def versions(self) -> dict[str, str]:
        """Installed versions of the packages, asked of themselves: onnxruntime-gpu is onnxruntime too."""
        return {package: import_module(package).__version__ for package in self.packages}


def _build_torch(
    checkpoint: Checkpoint, folder: Path, precision: str, profile: BuildProfile, on_step: OnStep
) -> list[Path]:
    """The torch engine is the checkpoint itself; the limits are kept so that every backend refuses the same."""
    from export.graphs import decoder_graph, vision_graph  # export takes seconds to import and is needed here alone
    from export.onnx_model import check_fit
    from export.weights import link_checkpoint

    check_fit(checkpoint, [graph(checkpoint.config, DTYPES[precision]) for graph in (vision_graph, decoder_graph)])
    on_step("linking weights")
    link_checkpoint(checkpoint, folder)
    return []


def _build_onnxruntime(
    checkpoint: Checkpoint, folder: Path, precision: str, profile: BuildProfile, on_step: OnStep
) -> list[Path]:
    """The two graphs as they are; the cache's capacity stays dynamic, see :func:`export.graphs.decoder_graph`."""
    from export.onnx_model import export_onnx

    return export_onnx(checkpoint, folder, DTYPES[precision], on_step=on_step)


BACKENDS = {
    backend.name: backend
    for backend in (
        # ONNX Runtime has no BF16 matrix product on the CPU: it computes in FP32 from BF16 weights.
        Backend("onnxruntime", ("fp32",), ("torch", "onnxruntime"), _build_onnxruntime),
        Backend("torch", ("bf16", "fp32"), ("torch",), _build_torch),
    )
}
DEFAULT_BACKEND = "onnxruntime" if find_spec("onnxruntime") else "torch"


def find_backend(name: str, precision: str | None) -> tuple[Backend, str]:
    """Look up a backend and the precision to build it in.

    Raises:
        BuildError: unknown, or not a combination that works; the message names those that do.
        MissingDependencyError: its package is not installed.
    """
    if name not in BACKENDS:
        raise BuildError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    missing = [package for package in backend.packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"backend {name} needs {missing[0]}, which is not installed (pip install {missing[0]}; ONNX Runtime has the"
            " operators for Python 3.11 and newer). --backend torch needs nothing more."
        )
    precision = precision or backend.precisions[0]
    if precision not in backend.precisions:
        raise BuildError(f"backend {name} cannot be built in {precision!r}, only in {' or '.join(backend.precisions)}")
    return backend, precision
