"""What `run.py compare` needs beyond the rest: Polygraphy, Matplotlib, and what Transformers' processor needs."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.util import find_spec

import torch

from qwen2vl_trt.errors import MissingDependencyError

_PACKAGES = {
    "polygraphy": "polygraphy",
    "matplotlib": "matplotlib",
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
}


def check_extra() -> None:
    """See that the packages of the extra are there.

    Raises:
        MissingDependencyError: naming the first that is not, and the extra.
    """
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingDependencyError(
                f"run.py compare needs {package}, which is not installed: pip install 'qwen2vl-trt[compare]'"
            )
    allow_torchvision()


def quieten() -> None:
    """Keep Transformers' progress bars and advice to itself: stderr is for what is wrong."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@cache
def allow_torchvision() -> torch.library.Library | None:
    """Make a torchvision built for CUDA importable beside a PyTorch for the CPU.

    Transformers' processor, the reference for pixels, needs torchvision. Its own operators cannot load there, and its
    import fails on two of their schemas; declared first, they are enough for its transforms, which are plain PyTorch.
    """
    with suppress(ImportError, RuntimeError, AttributeError):
        import torchvision  # noqa: F401

        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # the declarations live as long as this object
