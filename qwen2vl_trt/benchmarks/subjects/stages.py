"""Where a request's time goes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen2vl_trt.runtime.observer import Stage

from ..floors.rates import synchronize

STAGES_OF_A_REQUEST = ("preprocess", "vision", "prefill", "decode", "sampling", "host")
"""``preprocess`` is what the step does or waits for of it, ``host`` all the rest: chat template, tokens to text,
scheduling, embeddings."""


class StageClock:
    """Adds up the seconds of each stage, waiting for the device at the end of each.

    Only those of the thread that it was made on: what others load meanwhile costs what that one waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._thread = threading.get_ident()

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        began = time.perf_counter()
        yield
        synchronize(self._device)
        name = "preprocess" if stage.name in ("load", "wait") else stage.name
        self.seconds[name] += time.perf_counter() - began
