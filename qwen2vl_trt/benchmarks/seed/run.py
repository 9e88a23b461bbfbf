"""``run.py bench seed``: the seed implementation's comparisons on this machine, and what it cannot do.

A model of the real shape gets random weights, so nothing is downloaded. Our engines and Transformers run in processes
of their own, one after the other, because a large model may not fit twice; both run the same work in BF16. Both outputs
are compared with those of Transformers in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen2vl_trt.accuracy.figures import measure as compare_arrays
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.errors import BenchmarkError, Qwen2VLError
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.planning.counts import (
    BF16,
    decode_flops,
    decode_weight_bytes,
    head_weights,
    kv_bytes_per_token,
    prefill_flops,
    vision_flops,
    vision_weights,
)

from ..floors.rates import Rates, measure_rates
from ..random_model import random_checkpoint
from ..workers import Worker
from .contenders import Answer, Ours, Transformers
from .rows import Plan, Row, plan_for

DTYPE = torch.bfloat16
CPU_DEPTH = 4
"""Layers and blocks at most on a CPU, unless asked for."""


@dataclass(frozen=True)
class Deviation:
    """Mean relative error against Transformers in FP32: our engines', and that of Transformers in BF16."""

    ours: float
    theirs: float


@dataclass
class Result:
    """One row: answers of both, seconds of an item at least, how far the outputs are off.

    Attributes:
        tokens: of a prompt with its image, where it matters for the floor; 0 where it is not known.
        no_deviation: why there is none.
    """

    row: Row
    ours: Answer = field(default_factory=Answer)
    theirs: Answer = field(default_factory=Answer)
    tokens: int = 0
    floor: float | None = None
    deviation: Deviation | None = None
    no_deviation: str = ""

    @property
    def seconds(self) -> float | None:
        """Ours."""
        return next((timing.seconds for timing in self.ours.timings.values()), None)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each way of Transformers."""
        ours = self.seconds
        if ours is None:
            return {}
        return {how: timing.seconds / ours for how, timing in self.theirs.timings.items() if timing.seconds is not None}

    @property
    def errors(self) -> list[str]:
        """What failed, and whose it is."""
        found = []
        for name, answer in (("ours", self.ours), ("Transformers", self.theirs)):
            found += [f"{name}, {how}: {timing.error}" for how, timing in answer.timings.items() if timing.error]
            found += [f"{name}: {answer.error}"] * bool(answer.error)
        return found + [f"deviation: {self.no_deviation}"] * bool(self.no_deviation)


@dataclass(frozen=True)
class ModelResults:
    """All rows of one model; ``name`` as the checkpoint's folder is called."""

    name: str
    config: Qwen2VLConfig
    results: list[Result]


@dataclass(frozen=True)
class Report:
    """Of one run; ``interrupted`` where it was ended before all was measured."""

    device: str
    plan: Plan
    rates: Rates
    models: list[ModelResults]
    interrupted: bool = False


def run(models: list[str], device: str, layers: int | None, blocks: int | None, root: Path) -> Report:
    """Measure every row of every model, or what there is time for until Ctrl-C.

    Args:
        models: keys of :data:`~qwen2vl_trt.benchmarks.random_model.SHAPES`.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        layers: of the decoder; by default all on a GPU.
        blocks: of the vision tower; likewise.
        root: where checkpoints and engines are kept.

    Raises:
        BenchmarkError: no room on the disk.
    """
    kind = torch.device(device).type
    plan = plan_for(kind)
    if kind == "cpu":
        layers, blocks = layers or CPU_DEPTH, blocks or CPU_DEPTH
    rates = measure_rates(torch.device(device), DTYPE)
    measured: list[ModelResults] = []
    interrupted = False
    try:
        with progress_bar() as progress:
            task = progress.add_task("preparing", total=len(models) * (2 * len(plan.rows)))

            def tell(what: str) -> None:
                progress.update(task, description=what)
                progress.advance(task)

            for name in models:
                progress.update(task, description=f"{name}: writing random weights")
                checkpoint = random_checkpoint(name, layers, blocks, root / "checkpoints")
                model = ModelResults(checkpoint.name, Checkpoint(checkpoint).config, [Result(row) for row in plan.rows])
                measured.append(model)
                for measure in (partial(_measure_ours, plan, root), _measure_theirs):
                    measure(model, checkpoint, device, tell)
                    # Again and again: a slow moment would make a floor that engines fall through.
                    rates = rates.best(measure_rates(torch.device(device), DTYPE))
    except KeyboardInterrupt:
        interrupted = True
    for model in measured:
        for result in model.results:
            result.floor = floor_of(result.row, model.config, rates, result.tokens)
    return Report(device, plan, rates, measured, interrupted)


def _measure_ours(
    plan: Plan, root: Path, model: ModelResults, checkpoint: Path, device: str, tell: Callable[[str], None]
) -> None:
    profile = BuildProfile(4, 16384, plan.slots, 4096, 8192)
    folder = root / f"{model.name}-seed-{plan.slots}"
    build_engines(ResolvedModel(model.name, checkpoint), *find_backend("torch", "bf16"), profile, folder)
    with _Restarted(f"our {model.name}", partial(Ours, folder, device)) as ours:
        for result in model.results:
            tell(f"{model.name}: {result.row.title}")
            result.ours = ours.run(result.row)
            if result.row.kind in ("full model", "requests") and not result.errors:
                result.tokens = ours.call("prompt_tokens", result.row)


def _measure_theirs(model: ModelResults, checkpoint: Path, device: str, tell: Callable[[str], None]) -> None:
    with _Restarted(f"Transformers' {model.name}", partial(Transformers, checkpoint, device, DTYPE)) as theirs:
        for result in model.results:
            tell(f"{model.name}, Transformers: {result.row.title}")
            result.theirs = theirs.run(result.row)
        _compare(model.results, theirs)


def _compare(results: list[Result], theirs: _Restarted) -> None:
    compared = [result for result in results if result.row.compared]
    try:
        theirs.call("turn_to_fp32")
        for result in compared:
            _compare_with(result, theirs.call("reference", result.row))
    except Qwen2VLError as error:  # the process died, or has no room for FP32
        for result in compared:
            if result.deviation is None:
                result.no_deviation = str(error).splitlines()[-1]


def _compare_with(result: Result, reference: Any) -> None:
    if isinstance(reference, str):
        result.no_deviation = reference
        return
    outputs = [answer.output for answer in (result.ours, result.theirs) if answer.output is not None]
    if len(outputs) == 2:
        figures = (compare_arrays(output, reference, result.row.title) for output in outputs)
        result.deviation = Deviation(*(figure.mean_relative for figure in figures))


class _Restarted:
    """A contender's process, started again where it died in a row."""

    def __init__(self, name: str, setup: Callable[[], Any]) -> None:
        self._name, self._setup = name, setup
        self._stack = ExitStack()
        self._worker: Worker | None = None
        self._broken = ""  # why it does not start

    def __enter__(self) -> _Restarted:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def run(self, row: Row) -> Answer:
        """A row, or why the process ended in it."""
        try:
            return self.call("run", row)
        except Qwen2VLError as error:
            return Answer(error=str(error).splitlines()[-1])

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


def floor_of(row: Row, config: Qwen2VLConfig, rates: Rates, tokens: int) -> float | None:
    """Seconds of an item at least, at the measured rates; None where the prompt's length is not known.

    Args:
        row: what is measured.
        config: the model's.
        rates: of the device.
        tokens: of a prompt with its image.
    """
    towers = [vision_flops(config.vision, h, w).total * t for t, h, w in row.grids]
    read_tower = vision_weights(config.vision) * BF16
    if row.kind == "processor":
        pixels = sum(3 * height * width for height, width in row.sizes)
        patches = sum(h * w for _, h, w in row.grids) * config.vision.qwen2_vl_dim * DTYPE.itemsize
        return (pixels + patches) / rates.memory(pixels + patches) / len(row.sizes)
    if row.kind == "vision":
        return max(sum(towers) / rates.gemm, read_tower / rates.memory(read_tower)) / len(row.sizes)
    if row.kind == "decode":
        return _step_floor(row.batch, row.prompt + row.generate / 2, config, rates) / row.batch
    if not tokens:
        return None
    prompt = prefill_flops(config.text, tokens).total - 2.0 * head_weights(config.text)
    seconds = (sum(towers) + prompt) / rates.gemm
    if row.kind == "requests":
        steps = _step_floor(row.batch, tokens + row.generate / 2, config, rates)
        seconds += (row.generate - 1) * steps / row.batch
    return seconds


def _step_floor(batch: int, context: float, config: Qwen2VLConfig, rates: Rates) -> float:
    text = config.text
    size = decode_weight_bytes(text, BF16) + batch * context * kv_bytes_per_token(text)
    return max(size / rates.memory(int(size)), decode_flops(text, batch, context).total / rates.gemm)
