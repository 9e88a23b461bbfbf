"""The cases, on one system in a process of its own. Standard library alone: peers have interpreters of their own."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
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
    """Load a system, run every case once and print what it took, in CPU seconds of all threads, as a line of JSON.

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
        began = time.process_time()
        call(*arguments)
        return time.process_time() - began

    try:
        system.answer(text, images[:1], 1, 1)
        found["start"] = time.process_time()
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
