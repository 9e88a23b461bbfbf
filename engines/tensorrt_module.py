"""TensorRT and TensorRT for RTX: one API under two names, imported when a build asks for it, and how they differ."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qwen2vl_trt.errors import BuildError, MissingDependencyError


@dataclass(frozen=True)
class Variant:
    """One of the two.

    Attributes:
        backend: as ``--backend`` takes it, and the extra of this project that installs it.
        module: the Python package.
        oldest: first release whose attention takes lengths and a lower-right causal mask.
        below: first release that is not known to work.
        builds_anywhere: without a GPU, for compute capabilities that are named; no timing cache, no hardware
            compatibility level.
    """

    backend: str
    module: str
    oldest: tuple[int, int]
    below: int
    builds_anywhere: bool


# TensorRT 10.15 and 10.16 have attention and cache layers, but no key_value_lengths and no CausalMaskKind.
TENSORRT = Variant("tensorrt", "tensorrt", (11, 0), 12, builds_anywhere=False)
TENSORRT_RTX = Variant("tensorrt-rtx", "tensorrt_rtx", (1, 7), 2, builds_anywhere=True)


def load_tensorrt(variant: Variant) -> Any:
    """Import the module and check its version.

    Raises:
        MissingDependencyError: not installed, or without its libraries.
        BuildError: too old or too new.
    """
    needs, install = f"backend {variant.backend} needs", f"pip install 'qwen2vl-trt[{variant.backend}]'"
    try:
        module = import_module(variant.module)
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{needs} the package {variant.module}, which cannot be imported ({error}): {install}"
        ) from None
    version = str(module.__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if not variant.oldest <= numbers < (variant.below,):
        oldest = ".".join(map(str, variant.oldest))
        raise BuildError(
            f"{needs} {variant.module} {oldest} or later, older than {variant.below}; {version} is installed: {install}"
        )
    return module
