"""What there is: machine, versions, GPUs, and which backends run."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.errors import EngineError, MissingDependencyError
from qwen2vl_trt.machine import machine
from qwen2vl_trt.runtime.backends.runners import runner_module

from .finding import Finding

_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader")
_CHECKOUT = Path(__file__).resolve().parents[2]


def environment(device: torch.device) -> dict[str, Any]:
    """Facts by name, for JSON: those of :func:`qwen2vl_trt.machine.machine` and what a GPU's owner is asked for.

    ``gpus`` are those that torch sees, ``nvidia_smi`` what the driver's tool lists: a PyTorch for the CPU sees none.
    """
    seen = range(torch.cuda.device_count())
    properties = [torch.cuda.get_device_properties(number) for number in seen]
    driver = _said(*_GPU_QUERY).splitlines()
    return {
        **machine(device, "transformers", "onnxruntime", "onnxruntime-gpu", "triton", "numpy"),
        "revision": _said("git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty")
        if (_CHECKOUT / ".git").exists()
        else "",
        "system": platform.platform(),
        "memory_bytes": psutil.virtual_memory().total,
        "instruction_sets": _instruction_sets(),
        "torch_cuda": torch.version.cuda,
        "driver": driver[0].rsplit(", ", 1)[-1] if driver else None,
        "gpus": [
            {
                "name": each.name,
                "memory_bytes": each.total_memory,
                "compute_capability": f"{each.major}.{each.minor}",
            }
            for each in properties
        ],
        "nvidia_smi": driver,
    }


def gpu(facts: dict[str, Any], wanted: bool) -> Finding:
    """Whether torch sees the GPUs that the driver knows, which is a failure only where one is ``wanted``."""
    if facts["gpus"]:
        first = facts["gpus"][0]
        words = f"{len(facts['gpus'])} x {first['name']}, compute capability {first['compute_capability']}"
        return Finding("passed", words, first["memory_bytes"] / 1e9, "GB")
    if facts["nvidia_smi"] and wanted:
        torch_is = "is for CPUs: install one for CUDA"
        if facts["torch_cuda"]:
            torch_is = f"for CUDA {facts['torch_cuda']} sees none: is the driver too old, or CUDA_VISIBLE_DEVICES set?"
        return Finding("failed", f"nvidia-smi lists {facts['nvidia_smi'][0]}; torch {facts['torch']} {torch_is}")
    return Finding("skipped", "torch sees none")


def where_it_runs(name: str, device: str) -> tuple[str, str, list[str]] | Finding:
    """Version of a backend's package, the device that it runs on here, and precisions to try; else why it does not.

    One that is not installed, or is for GPUs on a machine without, is skipped; what is installed and broken fails.
    """
    backend, on_cpu = BACKENDS[name], device == "cpu"
    if find_spec(backend.package) is None or (on_cpu and backend.cpu_weights is None):
        why = "runs on GPUs alone" if on_cpu and backend.cpu_weights is None else f"{backend.package} is not installed"
        return Finding("skipped", why)
    try:
        version = str(backend.load().__version__)
        found = "cpu" if on_cpu or runner_module(backend).default_device() == "cpu" else device
    except (EngineError, MissingDependencyError) as error:
        return Finding("failed", str(error))
    precisions = [backend.default_precision(found).name] + ([] if backend.plans else ["fp32"])
    return version, found, list(dict.fromkeys(precisions))


def _instruction_sets() -> list[str]:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
        return [name for name in _SETS if name in flags]
    return [torch.backends.cpu.get_cpu_capability()]


def _said(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
