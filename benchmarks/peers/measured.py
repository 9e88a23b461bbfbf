"""The cases, on one system in a process of its own. Standard library alone: peers have interpreters of their own."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

STEPS = 8
"""Tokens after the first that a decode case takes."""
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""The checkpoint's chat template around a text, for peers that do not apply it themselves."""


class System(Protocol):
    """A model that is loaded."""

    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        """Answer the same prompt ``batch`` times together, greedily, with exactly so many tokens.

        Returns:
            The prompt's tokens.

        Raises:
            NotImplementedError: there are images and it has no vision tower.
        """

    def embed(self, images: list[str]) -> None:
        """Run the vision tower, the reading of the files included; NotImplementedError where it cannot be had alone."""


def main(
    load: Callable[[dict[str, Any]], System], *packages: str, convert: Callable[[str, str, str], None] | None = None
) -> None:
    """Load a system, run every case once and print what it took, as a line of JSON.

    Times are CPU seconds of all threads, and of the processes that it started and that ended.

    Args:
        load: takes ``given``, the JSON of the first argument.
        packages: whose versions are reported.
        convert: takes what follows ``--convert``: a checkpoint's folder, a precision, and the new folder to load from.
    """
    if sys.argv[1] == "--convert" and convert is not None:
        convert(*sys.argv[2:])
        return
    given = json.loads(sys.argv[1])
    text, images = given["text"], given["images"]
    system = load(given)
    found: dict[str, Any] = {}

    def seconds(call: Callable[..., object], *arguments: object) -> float:
        began = _cpu_seconds()
        call(*arguments)
        return _cpu_seconds() - began

    try:
        system.answer(text, images[:1], 1, 1)
        found["start"] = _cpu_seconds()
        found["request"] = seconds(system.answer, text, images[1:2], 1, 16)
        found["vision 1"] = seconds(system.embed, images[2:3])
        found["vision 8"] = seconds(system.embed, images) / len(images)
    except NotImplementedError:
        pass
    tokens = system.answer(text, [], 1, 1)  # a warm-up; text alone
    found["prefill"] = seconds(lambda: found.update(tokens=system.answer(given["long"], [], 1, 1)))
    found["prefill"] = found["tokens"] / found["prefill"]
    for batch in given["batches"]:
        first = seconds(system.answer, text, [], batch, 1)
        whole = seconds(system.answer, text, [], batch, 1 + STEPS)
        found[f"decode {batch}"] = batch * STEPS / (whole - first)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    found |= {"short": tokens, "peak": int(peak.split()[1]) * 1024 / 1e9}
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    print(json.dumps({"found": found, "versions": versions}))


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def declare_operators() -> Any:
    """A torchvision from PyPI is built for CUDA's torch; beside the CPU's, its import needs two operators declared.

    Returns:
        What must be kept as long as they are.
    """
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    with suppress(RuntimeError):  # declared already
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators
