"""Our engines and Transformers as contenders for every case, each loaded once in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2vl_trt.errors import BenchmarkError, Qwen2VLError
from qwen2vl_trt.runtime.backends.runners import open_engines

from ..bench.run import OURS, THEIRS
from ..subjects.engines import EngineOptions
from ..subjects.shapes import Case
from ..subjects.subject import Memory, Subject, Turn
from ..subjects.transformers import load_model
from ..workers import Worker, forget_peak, peak_bytes


class Contender:
    """Runs any case: a subject of its stage at a time."""

    def __init__(self, device: str, make: Callable[[str], Subject]) -> None:
        self._device, self._make = torch.device(device), make
        self._subject: Any = None

    def prepare(self, case: Case, how: str) -> tuple[str, str]:
        """As a subject does; memory is counted from here."""
        self._tidy()
        self.at_rest = self._start_counting()
        self._subject = self._make(case.stage)
        return self._subject.prepare(case, how)

    def run(self, count: int) -> Turn:
        return self._subject.run(count)

    def memory(self) -> Memory:
        """Peaks: of the process, and on a GPU of torch's memory."""
        cuda = self._device.type == "cuda"
        return Memory(peak_bytes(), torch.cuda.max_memory_allocated(self._device) if cuda else None)

    def before(self) -> int:
        """Bytes before the case: weights, and libraries on a CPU."""
        return self.at_rest

    def output(self) -> np.ndarray:
        """Of the case's last item, FP32; an array, since a tensor would stay in memory that the process shares."""
        return self._subject.output().float().cpu().numpy()

    def prompt_tokens(self) -> int:
        """Of a request of our pipeline's case, image included."""
        return self._subject.prompt_tokens()

    def _start_counting(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        forget_peak()
        return peak_bytes()

    def _tidy(self) -> None:
        self._subject = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class Ours(Contender):
    """Our engines; both are loaded here, so that a row's memory is counted from there."""

    def __init__(self, folder: Path, device: str) -> None:
        options, engines = EngineOptions(folder, device), open_engines(folder, device)
        _ = engines.vision, engines.decoder
        super().__init__(device, lambda stage: OURS[stage](options, engines))


class Transformers(Contender):
    """Transformers' model."""

    def __init__(self, checkpoint: Path, device: str, dtype: torch.dtype) -> None:
        self._model, self._dtype = load_model(checkpoint, dtype, torch.device(device)), dtype
        super().__init__(device, lambda stage: THEIRS[stage](checkpoint, "", self._dtype, device, self._model))

    def turn_to_fp32(self) -> None:
        """From now on :meth:`reference` has a model to run; the embedding table stays, its rows are cast."""
        self._tidy()
        self._dtype = torch.float32
        self._model.model.visual.float()
        language = self._model.model.language_model
        language.layers.float()
        language.norm.float()
        language.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())

    def reference(self, case: Case, how: str) -> np.ndarray:
        """The case's last item, alone and in FP32."""
        self._subject = self._make(case.stage)
        self._subject.how = how
        self._subject.load(case)
        return self.output()


class Restarted:
    """A contender's process, started again where it died."""

    def __init__(self, name: str, setup: Callable[[], Any]) -> None:
        self._name, self._setup = name, setup
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._broken = ""  # why it does not start

    def __enter__(self) -> Restarted:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises what the worker raises; where it does not even start, at once the next time."""
        if self._broken:
            raise BenchmarkError(self._broken)
        if self._worker is None:
            try:
                self._worker = self._stack.enter_context(Worker(self._name, self._setup))
            except Qwen2VLError as error:
                self._broken = str(error).splitlines()[-1]
                raise
        try:
            return self._worker.call(method, *arguments)
        except BenchmarkError:
            if not self._worker.alive:
                self._stack.close()
                self._worker = None
            raise
