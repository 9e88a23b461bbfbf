"""All checks in order, each in a worker process and within the minutes that are left."""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from qwen2vl_trt.benchmarks.cases import Case
from qwen2vl_trt.benchmarks.engines import EngineOptions, EngineSystem
from qwen2vl_trt.benchmarks.measure import Measurement, measure
from qwen2vl_trt.benchmarks.roofline import Rates, measure_rates
from qwen2vl_trt.benchmarks.scheduler import step_seconds
from qwen2vl_trt.benchmarks.workers import Worker
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.precision import Precision
from qwen2vl_trt.errors import Qwen2VLError, reason

from . import kernels, speed
from .agreement import build_tiny, compare_tiny
from .environment import environment, gpu, where_it_runs
from .finding import NO_TIME, Finding
from .report import Report, Row
from .serving import requests_per_second

CLIENTS = [1, 8, 64]
_SECONDS = 1.5
"""Of each number of clients."""
_OVER = 0.2
"""Of the minutes, by which a check that has begun may exceed them."""
_PATIENCE = 60.0
"""Seconds, and six times its estimate, after which a check is stopped."""
_Found = TypeVar("_Found")
Rows = dict[str, Finding]


@dataclass(frozen=True)
class _Engines:
    """Of the tiny model."""

    backend: str
    precision: str
    device: str

    @property
    def label(self) -> str:
        return f"tiny, {self.backend} {self.precision}"

    @property
    def chosen(self) -> Precision:
        return BACKENDS[self.backend].precision(self.precision)


class Verification:
    """One run.

    A check that raises, ends its process or does not end is a failed row; the next begins in a new process, since a
    CUDA error stays with the one that met it.

    Args:
        report: gets the rows.
        on_row: called with each.
        folder: for engines and weights.
        wants_gpu: a GPU that torch does not see is a failure.
    """

    def __init__(self, report: Report, on_row: Callable[[Row], None], folder: Path, wants_gpu: bool) -> None:
        self._report, self._on_row, self._folder, self._wants_gpu = report, on_row, folder, wants_gpu
        self._began = time.monotonic()
        self._worker = Worker("this check", _Caller)
        self._rates: dict[torch.dtype, Rates] = {}

    def run(self) -> None:
        """Run every check that fits."""
        try:
            with self._worker:
                self._all()
            self._report.interrupted = False
        finally:
            self._report.seconds = time.monotonic() - self._began

    def _all(self) -> None:
        device, cuda = torch.device(self._report.device), self._cuda
        self._call("environment", 5, environment, device, rows=self._note)
        built: dict[_Engines, Path] = {}
        for backend in BACKENDS:
            for engines in self._engines(backend):
                if (folder := self._built(engines)) is not None:
                    built[engines] = folder
        self._call("fused attention", 10, kernels.fused_attention, device)
        self._call("FP8 products", 5, kernels.fp8_products, device)
        self._call("preprocessor", 15 if cuda else 5, kernels.preprocessor, device)
        for precision in ("fp32", "bf16") if cuda else ("fp32",):  # FlashAttention and prompts' graphs take BF16
            folder = built.get(_Engines("torch", precision, self._report.device))
            for name, function in (("decode steps", kernels.decode_graphs), ("overlap", kernels.overlap)):
                title = name if precision == "fp32" else f"{name}, {precision}"
                if folder is None:
                    self._add(Row(title, Finding("skipped", f"it takes the torch backend in {precision}")))
                else:
                    self._call(title, 40 if cuda else 8, function, folder, device)
        for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32, torch.bfloat16):
            self._measure_rates(device, dtype)
        requests: dict[_Engines, float] = {}
        for engines, folder in built.items():
            given = (folder, engines.device, CLIENTS, _SECONDS)
            rows = partial(_serving, engines.label)
            found = self._call(f"{engines.label}: requests", 50 if cuda else 12, requests_per_second, *given, rows=rows)
            if found:
                requests[engines] = max(found.values())
        self._call("scheduler: host time", 10, step_seconds, 64, 100, rows=_host_time)
        # A decode step reads all weights: at published widths fewer bytes are faster, whatever tiny says.
        order = sorted(
            (each for each in built if each.device == self._report.device),
            key=lambda each: (each.chosen.decoder.itemsize, -requests.get(each, 0.0)),
        )
        for name, share in (("Qwen2.5-VL-3B", 0.5), ("Qwen2.5-VL-7B", 1.0)) if cuda else (("Qwen2.5-VL-3B", 1.0),):
            if order:
                with tempfile.TemporaryDirectory(dir=self._folder) as weights:  # gigabytes
                    self._published(name, order[0], share * self._left, Path(weights))
            else:
                self._add(Row(name.removeprefix("Qwen2.5-VL-"), Finding("skipped", "no engines were built")))

    def _note(self, facts: dict[str, Any]) -> Rows:
        self._report.machine = facts
        return {"GPU": gpu(facts, self._wants_gpu)}

    @property
    def _cuda(self) -> bool:
        return self._report.device != "cpu"

    def _engines(self, backend: str) -> list[_Engines]:
        """What to build of a backend that runs here."""
        name = f"backend {backend}"

        def rows(found: tuple[str, str, list[str]] | Finding) -> Rows:
            return {name: found if isinstance(found, Finding) else Finding("passed", f"{found[0]}, on {found[1]}")}

        seconds = 60 if backend == "tensorrt-llm" and self._cuda else 5
        found = self._call(name, seconds, where_it_runs, backend, self._report.device, rows=rows)
        return [_Engines(backend, each, found[1]) for each in found[2]] if isinstance(found, tuple) else []

    def _built(self, engines: _Engines) -> Path | None:
        folder = self._folder / f"{engines.backend}-{engines.precision}"
        given = (engines.backend, engines.precision, folder, max(CLIENTS))
        seconds = 90 if BACKENDS[engines.backend].plans else 12
        if self._call(f"{engines.label}: build", seconds, build_tiny, *given) is None:
            return None
        self._call(f"{engines.label}: accuracy", 40 if self._cuda else 10, compare_tiny, folder, engines.device)
        return folder

    def _measure_rates(self, device: torch.device, dtype: torch.dtype) -> None:
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"

        def rows(rates: Rates) -> Rows:
            found = {name: Finding("measured", "", rates.gemm / 1e12, "TFLOP/s")}
            if not self._rates:
                found = {"copy": Finding("measured", "", rates.copy / 1e9, "GB/s")} | found
            if rates.fp8_gemm is not None and device.type != "cpu":
                found["matrix product, float8_e4m3fn"] = Finding("measured", "", rates.fp8_gemm / 1e12, "TFLOP/s")
            return found

        found = self._call(name, 10, measure_rates, device, dtype, rows=rows)
        if found is not None:
            self._rates[dtype] = found

    def _published(self, name: str, engines: _Engines, seconds: float, root: Path) -> None:
        """A published shape with random weights, as deep as fits the seconds, memory and disk."""
        rates, label = self._rates.get(engines.chosen.vision), name.removeprefix("Qwen2.5-VL-")
        gpus, memory = self._report.machine.get("gpus"), float(psutil.virtual_memory().available)
        if self._cuda and gpus:
            memory = 0.9 * gpus[torch.device(engines.device).index or 0]["memory_bytes"]
        plans = BACKENDS[engines.backend].plans
        if rates is None:  # its row says why
            self._add(Row(label, Finding("skipped", "the matrix product was not measured")))
            return
        model = speed.deepest(name, engines.chosen, plans, self._cuda, rates, seconds, memory, root)
        if isinstance(model, Finding):
            self._add(Row(label, model))
            return
        label = model.label
        given = (model, engines.backend, engines.precision, self._cuda, root)
        title = f"{label}, {engines.backend} {engines.precision}: build"
        folder = self._call(title, model.build_seconds(plans), speed.build_random, *given)
        if folder is None:
            return
        loading = 60.0 if self._cuda else 10.0
        with Worker(label, partial(EngineSystem, EngineOptions(folder, engines.device))) as worker:
            for case in speed.cases_of(self._cuda):

                def call(case: Case = case) -> tuple[list[Measurement], list[str]]:
                    return measure(case, [worker], speed.UNTIL), []

                def rows(found: list[Measurement], case: Case = case) -> Rows:
                    findings = speed.findings_of(case, found[0], model.config, engines.chosen, rates)
                    return {f"{label}: {name}": finding for name, finding in findings.items()}

                needed = loading + speed.seconds_of(case, model.config, engines.chosen, rates)
                if self._check(f"{label}: {case.label}", needed, worker, call, rows) is not None:
                    loading = 0.0

    def _call(
        self,
        name: str,
        seconds: float,
        function: Callable[..., _Found],
        *arguments: Any,
        rows: Callable[[_Found], Rows] | None = None,
    ) -> _Found | None:
        """Call a function in the worker, see :meth:`_check`; what is no finding has passed unless ``rows`` say more."""
        call = partial(self._worker.call, "call", function, *arguments)

        def one(found: _Found) -> Rows:
            return {name: found if isinstance(found, Finding) else Finding("passed")}

        return self._check(name, seconds, self._worker, call, rows or one)

    def _check(
        self,
        name: str,
        seconds: float,
        worker: Worker,
        call: Callable[[], tuple[_Found, list[str]]],
        rows: Callable[[_Found], Rows],
    ) -> _Found | None:
        """Make a check's rows; returns what it found, None where it was skipped, raised or failed.

        Args:
            seconds: that it should take.
            worker: runs it, and is ended where it fails.
            call: gives what was found and warnings.
            rows: of that.
        """
        if seconds > self._left:
            self._add(Row(name, Finding("skipped", NO_TIME)))
            return None
        began = time.monotonic()
        last = self._left + _OVER * 60 * self._report.minutes
        worker.deadline = began + min(6 * seconds + _PATIENCE, last)
        try:
            found, warnings = call()
            findings = rows(found)
        except Exception as error:  # whatever it is, the others go on
            worker.__exit__(type(error), error, None)
            taken = time.monotonic() - began
            stopped = taken >= last
            why = f"{NO_TIME} after {taken:.0f} s of it" if stopped else _first_line(error)
            self._add(Row(name, Finding("skipped" if stopped else "failed", why), taken))
            return None
        taken = time.monotonic() - began
        for number, (row, finding) in enumerate(findings.items()):
            self._add(Row(row, finding, taken if not number else 0.0, warnings if not number else []))
        ended = isinstance(found, Finding) and found.result == "failed"
        return None if ended else found

    @property
    def _left(self) -> float:
        return self._began + 60 * self._report.minutes - time.monotonic()

    def _add(self, row: Row) -> None:
        self._report.rows.append(row)
        self._on_row(row)


def _host_time(seconds: float) -> Rows:
    return {"scheduler: host time of a step": Finding("measured", "64 greedy answers", seconds * 1e6, "us")}


def _serving(label: str, found: dict[int, float]) -> Rows:
    return {
        f"{label}: {clients} client{'s' * (clients > 1)}": Finding("measured", "", value, "requests/s")
        for clients, value in found.items()
    }


def _first_line(error: Exception) -> str:
    said = reason(error) if isinstance(error, Qwen2VLError) else f"{type(error).__name__}: {reason(error)}"
    return said.partition(r"\n")[0]  # as this project's errors write a line break


class _Caller:
    """What runs in the worker."""

    def call(self, function: Callable[..., _Found], *arguments: Any) -> tuple[_Found, list[str]]:
        """What a function returns, and the warnings that were logged meanwhile."""
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(" ".join(record.getMessage().split()))  # type: ignore[method-assign]
        logging.getLogger("qwen2vl_trt").addHandler(handler)
        try:
            return function(*arguments), list(dict.fromkeys(said))
        finally:
            logging.getLogger("qwen2vl_trt").removeHandler(handler)
            if torch.cuda.is_available():
                gc.collect()  # engines that a graph still holds
                torch.cuda.empty_cache()


def verify(report: Report, on_row: Callable[[Row], None], wants_gpu: bool) -> None:
    """Run all checks into a report, in a temporary folder; a KeyboardInterrupt leaves there what there is."""
    with tempfile.TemporaryDirectory(prefix="qwen2vl-verify-") as folder:
        Verification(report, on_row, Path(folder), wants_gpu).run()
