"""What ``run.py batch`` needs beyond the rest."""

from __future__ import annotations

from importlib.util import find_spec

from qwen2vl_trt.errors import MissingDependencyError


def check_extra() -> None:
    """See that the packages of the extra are there.

    Raises:
        MissingDependencyError: naming the first that is not, and the extra.
    """
    for package in ("ray", "pyarrow", "psutil"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"run.py batch needs {package}, which is not installed: pip install 'qwen2vl-trt[ray]'"
            )
