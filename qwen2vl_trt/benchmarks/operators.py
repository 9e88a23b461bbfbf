"""Time by operator (``--export-profile``), from the backend's own profiler; in a run of its own, since it slows."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen2vl_trt.runtime.backends.runners import DecoderRunner, Engines, VisionRunner

from .cases import Case
from .engines import EngineOptions, EngineSystem
from .workers import Worker

ITERATIONS = 3


@dataclass(frozen=True)
class Operator:
    """One layer of a graph, or one of torch's operators.

    Attributes:
        name: the layer's; torch's operators go by theirs.
        kind: ONNX operator type, ``torch``, or ``TensorRT``, whose layers may be several fused ones.
        calls: in all iterations.
        milliseconds: of its own in all iterations, without what it calls; the device's on a GPU.
        percentage: of all operators' time.
    """

    name: str
    kind: str
    calls: int
    milliseconds: float
    percentage: float


def profile_operators(options: EngineOptions, cases: Sequence[Case]) -> list[list[Operator]]:
    """Operators of each case, the slowest first; each in a process of its own."""
    found = []
    for case in cases:
        with Worker("the profiler", Profiler) as worker:
            found.append(worker.call("operators", options, case))
    return found


class Profiler:
    """What runs in that process."""

    def operators(self, options: EngineOptions, case: Case) -> list[Operator]:
        system = EngineSystem(options)
        backend = "torch" if case.stage == "processor" else system.engines.manifest.backend
        profile = {"torch": _torch_rows, "onnxruntime": _onnxruntime_rows}.get(backend, _tensorrt_rows)
        rows = profile(system, case)
        total = sum(milliseconds for *_, milliseconds in rows) or 1.0
        operators = [Operator(*row, 100 * row[-1] / total) for row in rows if row[-1]]
        return sorted(operators, key=lambda operator: -operator.milliseconds)


_Rows = list[tuple[str, str, int, float]]


def _torch_rows(system: EngineSystem, case: Case) -> _Rows:
    os.environ["KINETO_LOG_LEVEL"] = "99"  # it would write to stderr when it starts and ends
    cuda = system.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    system.prepare(case)
    with torch.profiler.profile(activities=activities) as profiler:
        system.run(ITERATIONS)
    if cuda:  # kernels and copies; an operator's time on the device is that of its kernels
        on_gpu = [row for row in profiler.key_averages() if row.device_type == torch.autograd.DeviceType.CUDA]
        return [(row.key, "torch", row.count, row.self_device_time_total / 1e3) for row in on_gpu]
    return [(row.key, "torch", row.count, row.self_cpu_time_total / 1e3) for row in profiler.key_averages()]


class _ProfiledSessions:
    """ONNX Runtime as a backend whose sessions are profiled, which is decided when they are made."""

    def __init__(self, folder: str) -> None:
        from qwen2vl_trt.runtime.backends import onnxruntime_runner

        self._runner, self._folder = onnxruntime_runner, folder
        self.sessions: list[Any] = []

    def load_vision(self, engines: Engines) -> VisionRunner:
        return self._runner.load_vision(engines, self._session(engines, "vision"))

    def load_decoder(self, engines: Engines) -> DecoderRunner:
        return self._runner.load_decoder(engines, self._session(engines, "decoder"))

    def default_device(self) -> str:
        return "cpu"

    def _session(self, engines: Engines, stage: str) -> Any:
        prefix = Path(self._folder) / stage
        path, fp8 = engines.folder / f"{stage}.onnx", engines.precision.fp8
        session = self._runner.open_session(path, engines.device, profile=prefix, fp8=fp8)
        self.sessions.append(session)
        return session


def _onnxruntime_rows(system: EngineSystem, case: Case) -> _Rows:
    with tempfile.TemporaryDirectory() as folder:
        backend = _ProfiledSessions(folder)
        system.engines = replace(system.engines, runner=backend)
        system.prepare(case)
        system.run(ITERATIONS)
        events = [json.loads(Path(session.end_profiling()).read_text()) for session in backend.sessions]
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for of_session in events:
        runs = sorted(event["ts"] for event in of_session if event["name"] == "model_run")
        counted = runs[len(runs) // (ITERATIONS + 1)]  # what came before is the run that prepared
        for event in of_session:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= counted:
                name = event["name"].removesuffix("_kernel_time")
                totals[name, event["args"]["op_name"]].append(event["dur"] / 1e3)
    return [(name, kind, len(times), sum(times)) for (name, kind), times in totals.items()]


def _tensorrt_rows(system: EngineSystem, case: Case) -> _Rows:
    times: dict[str, list[float]] = defaultdict(list)
    for stage in ("vision", "decoder"):
        if case.stage in (stage, "pipeline"):
            getattr(system.engines, stage).profile(lambda layer, milliseconds: times[layer].append(milliseconds))
    system.prepare(case)
    times.clear()
    system.run(ITERATIONS)
    return [(name, "TensorRT", len(found), sum(found)) for name, found in times.items()]
