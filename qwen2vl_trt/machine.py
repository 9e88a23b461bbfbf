"""The machine and the versions, for the head of a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import __version__


def machine(device: torch.device, *packages: str) -> dict[str, Any]:
    """CPU, cores, load, GPU where ``device`` is one, and versions; a package that is not installed is left out.

    The load is the system's average of the last minute, this process included: above ``threads``, other processes took
    part.
    """
    versions = {"python": platform.python_version(), "qwen2vl-trt": __version__, "torch": torch.__version__}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {
        **gpu,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"load": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}),  # Windows has none
        **versions,
    }


def one_line(facts: dict[str, Any]) -> str:
    """What :func:`machine` found, for a report as text."""
    return " · ".join(f"{name} {value}" for name, value in facts.items())


def _cpu() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()
