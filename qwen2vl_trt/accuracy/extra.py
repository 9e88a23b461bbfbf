"""What `run.py compare` needs beyond the rest: Polygraphy, Matplotlib, and what Transformers' processor needs."""

from __future__ import annotations

from importlib.util import find_spec

from qwen2vl_trt.errors import MissingDependencyError
from qwen2vl_trt.export.importable_torchvision import allow_torchvision

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
