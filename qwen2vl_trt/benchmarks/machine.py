"""The machine, for the head of a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from typing import Any

import torch

from qwen2vl_trt import __version__
from qwen2vl_trt.accuracy.machine import processor


def gpu(device: torch.device) -> dict[str, Any]:
    """The GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, load and versions; a package that is not installed is left out.

    The load is the system's average of the last minute, a measurement's own threads included: above these others took
    part.
    """
    versions = {"qwen2vl-trt": __version__, "torch": torch.__version__}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"load": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}),  # Windows has none
        "python": platform.python_version(),
        **versions,
    }


def one_line(facts: dict[str, Any]) -> str:
    """What :func:`machine` found, as a report's head has it."""
    return " · ".join(f"{name} {value}" for name, value in facts.items())
