"""``run.py bench comparisons``: the seed implementation's comparisons on this machine, and what it cannot do.

A model of the real shape gets random weights, so nothing is downloaded. Our engines and Transformers run in processes
of their own, one after the other, because a large model may not fit twice; both run the same work in BF16. Both outputs
are compared with those of Transformers in FP32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from qwen2vl_trt.accuracy.figures import measure as compare_arrays
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.errors import Qwen2VLError
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

from ..bench.run import Measurement, Until, measure
from ..floors.rates import Rates, measure_rates
from ..random_model import random_checkpoint
from ..subjects.shapes import Case
from .cases import BATCHED, ONE, Plan, Row, plan_for
from .contenders import Ours, Restarted, Transformers

DTYPE = torch.bfloat16
_UNTIL = Until(warm_up=None, duration=2.0, iterations=1)
_ALONE = 4  # requests of the row of many, where they run one at a time
CPU_DEPTH = 4
"""Layers and blocks at most on a CPU, unless asked for."""


@dataclass(frozen=True)
class Deviation:
    """Mean relative error against Transformers in FP32: our engines', and that of Transformers in BF16."""

    ours: float
    theirs: float


@dataclass(frozen=True)
class Timing:
    """What a way took.

    Attributes:
        seconds: of an item, the median of ``runs``; None where it failed.
        runs: that were counted.
        peak: bytes at most meanwhile: of torch's memory on a GPU, of the process on a CPU.
        before: bytes before it: weights, and libraries on a CPU.
        error: why it failed.
    """

    seconds: float | None
    runs: int = 0
    peak: int = 0
    before: int = 0
    error: str = ""


@dataclass
class Result:
    """One row: timings of both by way, seconds of an item at least, how far the outputs are off.

    Attributes:
        outputs: of the row's last item, ours and Transformers', where they are compared.
        tokens: of a prompt with its image, where it matters for the floor; 0 where it is not known.
        no_deviation: why there is none.
    """

    row: Row
    ours: dict[str, Timing] = field(default_factory=dict)
    theirs: dict[str, Timing] = field(default_factory=dict)
    outputs: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    floor: float | None = None
    deviation: Deviation | None = None
    no_deviation: str = ""

    @property
    def seconds(self) -> float | None:
        """Ours."""
        return next((timing.seconds for timing in self.ours.values()), None)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each way of Transformers."""
        ours = self.seconds
        if ours is None:
            return {}
        return {how: timing.seconds / ours for how, timing in self.theirs.items() if timing.seconds is not None}

    @property
    def errors(self) -> list[str]:
        """What failed, and whose it is."""
        both = (("ours", self.ours), ("Transformers", self.theirs))
        found = [f"{name}, {how}: {timing.error}" for name, t in both for how, timing in t.items() if timing.error]
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
                for measure_model in (partial(_measure_ours, plan, root), _measure_theirs):
                    measure_model(model, checkpoint, device, tell)
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
    folder = root / f"{model.name}-comparisons-{plan.slots}"
    build_engines(ResolvedModel(model.name, checkpoint), *find_backend("torch", "bf16"), profile, folder)
    with Restarted(f"our {model.name}", partial(Ours, folder, device)) as ours:
        for result in model.results:
            row = result.row
            tell(f"{model.name}: {row.case.label}")
            result.ours[BATCHED] = _time(ours, row.case, BATCHED, result.outputs if row.compared else None)
            if row.case.stage == "hidden states" and result.outputs:
                result.tokens = len(result.outputs[-1])
            elif row.case.stage == "pipeline" and not result.errors:
                result.tokens = ours.call("prompt_tokens")


def _measure_theirs(model: ModelResults, checkpoint: Path, device: str, tell: Callable[[str], None]) -> None:
    with Restarted(f"Transformers' {model.name}", partial(Transformers, checkpoint, device, DTYPE)) as theirs:
        for result in model.results:
            row = result.row
            tell(f"{model.name}, Transformers: {row.case.label}")
            for how in row.ways:
                few = row.case.stage == "pipeline" and how == ONE
                case = replace(row.case, batch=min(row.case.batch, _ALONE)) if few else row.case
                first = row.compared and how == row.ways[0]
                result.theirs[how] = _time(theirs, case, how, result.outputs if first else None)
        _compare([result for result in model.results if result.row.compared], theirs)


def _time(contender: Restarted, case: Case, how: str, outputs: list[np.ndarray] | None) -> Timing:
    """One way of a case, or why it failed: the others are not concerned. Its output is added to ``outputs``."""
    try:
        (found,) = measure(case, [contender], _UNTIL, how)
        before = contender.call("before")
        if outputs is not None:
            outputs.append(contender.call("output"))
    except Qwen2VLError as error:
        return Timing(None, error=_last_line(error))
    assert found.memory is not None
    peak = found.memory.host if found.memory.device is None else found.memory.device
    return Timing(_item_seconds(found, case), len(found.turns), peak, before)


def _item_seconds(measurement: Measurement, case: Case) -> float:
    if case.stage == "decoder":
        return measurement.statistics["time_between_tokens"].mean / 1e3 / case.batch
    return statistics.median(measurement.turns) / (case.batch * max(len(case.sizes), 1))


def _compare(results: list[Result], theirs: Restarted) -> None:
    """Both outputs with Transformers in FP32."""
    for number, result in enumerate(results):
        try:
            if not number:
                theirs.call("turn_to_fp32")
            reference = theirs.call("reference", result.row.case, ONE)
        except Qwen2VLError as error:  # the process died, or has no room for FP32
            result.no_deviation = _last_line(error)
            continue
        if len(result.outputs) == 2:
            figures = (compare_arrays(output, reference, result.row.case.label) for output in result.outputs)
            result.deviation = Deviation(*(figure.mean_relative for figure in figures))


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1][:200]


def floor_of(row: Row, config: Qwen2VLConfig, rates: Rates, tokens: int) -> float | None:
    """Seconds of an item at least, at the measured rates; None where the prompt's length is not known.

    Args:
        row: what is measured.
        config: the model's.
        rates: of the device.
        tokens: of a prompt with its image.
    """
    case = row.case
    towers = [vision_flops(config.vision, h, w).total * t for t, h, w in case.grids]
    read_tower = vision_weights(config.vision) * BF16
    if case.stage == "processor":
        pixels = sum(3 * height * width for height, width in case.sizes)
        patches = sum(h * w for _, h, w in case.grids) * config.vision.qwen2_vl_dim * DTYPE.itemsize
        return (pixels + patches) / rates.memory(pixels + patches) / len(case.sizes)
    if case.stage == "vision":
        return max(sum(towers) / rates.gemm, read_tower / rates.memory(read_tower)) / len(case.sizes)
    if case.stage == "decoder":
        return _step_floor(case.batch, case.prompt + case.generate / 2, config, rates) / case.batch
    if not tokens:
        return None
    prompt = prefill_flops(config.text, tokens).total - 2.0 * head_weights(config.text)
    seconds = (sum(towers) + prompt) / rates.gemm
    if case.stage == "pipeline":
        steps = _step_floor(case.batch, tokens + case.generate / 2, config, rates)
        seconds += (case.generate - 1) * steps / case.batch
    return seconds


def _step_floor(batch: int, context: float, config: Qwen2VLConfig, rates: Rates) -> float:
    text = config.text
    size = decode_weight_bytes(text, BF16) + batch * context * kv_bytes_per_token(text)
    return max(size / rates.memory(int(size)), decode_flops(text, batch, context).total / rates.gemm)
