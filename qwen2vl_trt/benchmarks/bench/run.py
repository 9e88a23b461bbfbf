"""Measures engines, and Transformers beside them: who takes which turn, and what the samples add up to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import onnx_ir as ir
import torch

from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.runtime.backends.runners import Engines, open_engines
from qwen2vl_trt.runtime.preprocessing.preprocessor import PreprocessorSettings
from qwen2vl_trt.windows import window_layout

from ..floors.rates import Floor, Rates, measure_rates
from ..floors.work import Work, count_work, decoder_call, vision_call
from ..subjects.engines import (
    DecoderSubject,
    EngineOptions,
    EngineSubject,
    HiddenStatesSubject,
    PipelineSubject,
    ProcessorSubject,
    VisionSubject,
)
from ..subjects.shapes import Case, Limits, Shape, cases
from ..subjects.subject import FIGURES, Memory, Sample, Turn
from ..subjects.transformers import (
    TransformersDecoder,
    TransformersHiddenStates,
    TransformersPipeline,
    TransformersProcessor,
    TransformersSubject,
    TransformersVision,
)
from ..workers import Worker
from .operators import Operator, profile_operators
from .percentiles import Statistics

_TURN = 0.25  # seconds that one contender runs before the next has its turn

OURS: dict[str, type[EngineSubject]] = {
    "processor": ProcessorSubject,
    "vision": VisionSubject,
    "decoder": DecoderSubject,
    "hidden states": HiddenStatesSubject,
    "pipeline": PipelineSubject,
}
THEIRS: dict[str, type[TransformersSubject]] = {
    "processor": TransformersProcessor,
    "vision": TransformersVision,
    "decoder": TransformersDecoder,
    "hidden states": TransformersHiddenStates,
    "pipeline": TransformersPipeline,
}


@dataclass(frozen=True)
class Until:
    """When to stop: trtexec's options.

    Attributes:
        warm_up: seconds that do not count; None for none, not even one turn.
        duration: seconds at least.
        iterations: at least.
    """

    warm_up: float | None = 0.2
    duration: float = 3.0
    iterations: int = 10


@dataclass
class Measurement:
    """What one contender did in one case.

    Attributes:
        name: of the contender.
        how: the way it chose, or nothing.
        seconds: of all its turns.
        samples: one an iteration; one a request in the pipeline.
        turns: seconds of an iteration in each turn, by the host's clock.
        stages: seconds of each stage of the pipeline.
        memory: peak of the case.
    """

    name: str
    how: str
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None

    def add(self, turn: Turn, iterations: int) -> None:
        self.seconds += turn.seconds
        self.turns.append(turn.seconds / iterations)
        self.samples += turn.samples
        for stage, seconds in turn.stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def milliseconds(self, figure: str) -> list[float]:
        """Samples of a key of :data:`~qwen2vl_trt.benchmarks.subjects.subject.FIGURES`; none where there are none."""
        return [1e3 * value for sample in self.samples for value in sample.get(figure, ())]

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Of every figure that has samples."""
        return {figure: Statistics.of(values) for figure in FIGURES if (values := self.milliseconds(figure))}

    @property
    def shares(self) -> dict[str, float]:
        """Of each stage of the pipeline in its time; they add up to 1."""
        return {stage: seconds / self.seconds for stage, seconds in self.stages.items()}

    def throughput(self, case: Case) -> dict[str, float]:
        """Rates by unit: all that was done over all seconds; ``decode tokens/s`` leaves prefill out."""
        rate = len(self.samples) / self.seconds
        if case.stage in ("processor", "vision"):
            return {"queries/s": rate, "images/s": rate * len(case.grids)}
        if case.stage == "pipeline":
            return {"requests/s": rate, "tokens/s": rate * case.generate}
        found = {"queries/s": rate, "tokens/s": rate * case.batch * case.generate}
        between = self.statistics.get("time_between_tokens")
        return found | ({"decode tokens/s": 1e3 * case.batch / between.mean} if between else {})


@dataclass
class Result:
    """One case.

    Attributes:
        case: what was measured.
        ours: our engines.
        rival: the contender beside them, if any.
        floors: by figure; None where a rate that it needs could not be measured.
        streams: inferences at a time.
        operators: time of each, where asked for.
    """

    case: Case
    ours: Measurement
    rival: Measurement | None = None
    floors: dict[str, Floor | None] = field(default_factory=dict)
    streams: int = 1
    operators: list[Operator] | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster we are: of the first rate, and of the medians of what both have."""
        if self.rival is None:
            return {}
        unit = next(iter(self.ours.throughput(self.case)))
        theirs, ours = self.rival.statistics, self.ours.statistics
        return {unit: self.ours.throughput(self.case)[unit] / self.rival.throughput(self.case)[unit]} | {
            figure: theirs[figure].median / ours[figure].median for figure in ours if figure in theirs
        }

    def reached(self, figure: str, floor: Floor) -> float:
        """Share of what the device could do: the floor over the median, or over the time a call with streams."""
        if self.streams > 1:
            return floor.seconds * len(self.ours.samples) / self.ours.seconds
        return 1e3 * floor.seconds / self.ours.statistics[figure].median


@dataclass(frozen=True)
class Options:
    """Of one run.

    Attributes:
        engines: which, and how.
        stages: of :data:`~qwen2vl_trt.benchmarks.subjects.shapes.ALL_STAGES`.
        shapes: what ``--shapes`` says.
        until: when to stop.
        against: precision in which Transformers runs beside us; None alone.
        profile: take the time of every operator, after the rest.
        trace: record a timeline of the last pipeline case, after the rest.
    """

    engines: EngineOptions
    stages: tuple[str, ...]
    shapes: tuple[Shape, ...] = ()
    until: Until = Until()
    against: str | None = None
    profile: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Report:
    """Of one run: the engines, the rates of the device, a result a case, and a timeline where asked for.

    ``ended_by`` is the Ctrl-C or the error before which all of ``results`` were measured; None where there are no more.
    """

    engines: Engines
    rates: Rates
    results: list[Result]
    trace: dict[str, Any] | None = None
    ended_by: BaseException | None = None


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""In which Transformers can run."""


def run(options: Options) -> Report:
    """Measure everything, or what there is time for until Ctrl-C or an error.

    Raises, if nothing has been measured before:
        EngineError: the engines cannot run here.
        LimitError: a shape outside their profile.
        BenchmarkError: a shape of no stage, or a process that died.
    """
    engines = open_engines(options.engines.folder, options.engines.device)
    settings = PreprocessorSettings.from_folder(engines.checkpoint.folder)
    limits = Limits(engines.manifest.profile, engines.checkpoint.config.vision, settings)
    todo = cases(options.stages, options.shapes, limits)
    rates = measure_rates(engines.device, engines.dtype)
    results: list[Result] = []
    trace, ended_by = None, None
    try:
        _measure_stages(options, engines, todo, results)
        if options.trace:
            with Worker("the timeline", partial(PipelineSubject, options.engines)) as worker:
                trace = worker.call("trace", [case for case in todo if case.stage == "pipeline"][-1])
        rates = rates.best(measure_rates(engines.device, engines.dtype))  # a busy moment hits one of the two at most
        _add_floors(results, engines, rates)
    except (KeyboardInterrupt, Exception) as reason:  # told once what was measured is printed: without floors, at once
        if not results:
            raise
        ended_by = reason
    return Report(engines, rates, results, trace, ended_by)


def _measure_stages(options: Options, engines: Engines, todo: list[Case], results: list[Result]) -> None:
    """Add a result of each case, once it is whole."""
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(todo))
        for stage in options.stages:
            of_stage = [case for case in todo if case.stage == stage]
            with ExitStack() as stack:
                workers = [stack.enter_context(worker) for worker in _start(stage, options, engines)]
                for case in of_stage:
                    progress.update(task, description=f"{stage} {case.label}")
                    ours, *rivals = measure(case, workers, options.until)
                    rival = rivals[0] if rivals else None
                    results.append(Result(case, ours, rival, streams=options.engines.streams))
                    progress.advance(task)
            if options.profile:
                progress.update(task, description=f"{stage} operators")
                operators = profile_operators(partial(OURS[stage], replace(options.engines, streams=1)), of_stage)
                for result, found in zip(results[-len(of_stage) :], operators):
                    result.operators = found


def _start(stage: str, options: Options, engines: Engines) -> list[Worker]:
    workers = [Worker(f"our {stage}", partial(OURS[stage], options.engines))]
    if options.against is not None:
        dtype, checkpoint = PRECISIONS[options.against], engines.checkpoint.folder
        theirs = partial(THEIRS[stage], checkpoint, options.against, dtype, str(engines.device))
        try:
            workers.append(Worker(f"Transformers' {stage}", theirs))
        except BaseException as error:
            workers[0].__exit__(type(error), error, None)
            raise
    return workers


class Contender(Protocol):
    """A :class:`~qwen2vl_trt.benchmarks.workers.Worker` of a subject."""

    def call(self, method: str, *arguments: Any) -> Any: ...


def measure(case: Case, workers: Sequence[Contender], until: Until, how: str = "") -> list[Measurement]:
    """Measure contenders turn and turn about, so that a busy moment hits all of them.

    All stop together, when each has both the iterations and the duration.

    Args:
        case: what to measure.
        workers: one, or several turn about.
        until: when to stop.
        how: the way, for contenders that have several; by default the fastest.
    """
    found, counts = [], []
    for worker in workers:  # one after the other: they would slow each other
        found.append(Measurement(*worker.call("prepare", case, how)))
        counts.append(_warm_up(worker, until))
    while any(len(each.samples) < until.iterations or each.seconds < until.duration for each in found):
        for worker, count, measurement in zip(workers, counts, found):
            left = until.iterations - len(measurement.samples)
            enough = left if measurement.seconds >= until.duration and left > 0 else count
            iterations = min(count, enough)
            measurement.add(worker.call("run", iterations), iterations)
    for worker, measurement in zip(workers, found):
        measurement.memory = worker.call("memory")
    return found


def _warm_up(worker: Contender, until: Until) -> int:
    """Run for a while; returns the iterations of a turn: 1 where there is no warm-up."""
    if until.warm_up is None:
        return 1
    seconds = iterations = 0.0
    count = 1
    while True:
        turn: Turn = worker.call("run", count)
        seconds += turn.seconds
        iterations += count
        if seconds >= until.warm_up:
            break
        count *= 2
    turn_seconds = min(_TURN, max(until.duration, seconds / iterations))
    return max(min(int(turn_seconds * iterations / seconds), max(until.iterations, 1)), 1)


def _add_floors(results: list[Result], engines: Engines, rates: Rates) -> None:
    """The least that each case could take, from the graph that the engines were built from."""
    for result in results:
        if result.case.stage == "processor":
            result.floors = {"latency": Floor.of(_moved(result.case, engines), rates)}
    for stage, floors in (("vision", _vision_floors), ("decoder", _decoder_floors)):
        of_stage = [result for result in results if result.case.stage == stage]
        if of_stage:
            graph = load_graph(engines, stage)
            for result in of_stage:
                result.floors = {
                    figure: Floor.of(work, rates) for figure, work in floors(graph, result.case, engines).items()
                }


def _moved(case: Case, engines: Engines) -> Work:
    """Bytes that the preprocessor reads and writes: 8 bits in, patches out."""
    read = sum(3 * height * width for height, width in case.sizes)
    return Work(
        weight_bytes=read + case.patches * engines.checkpoint.config.vision.qwen2_vl_dim * engines.dtype.itemsize
    )


def _vision_floors(graph: ir.Graph, case: Case, engines: Engines) -> dict[str, Work]:
    config = engines.checkpoint.config.vision
    layout = window_layout(case.grids, config)
    call = vision_call(layout.window_lengths.tolist(), layout.sequence_lengths.tolist(), config.merge_unit)
    return {"latency": count_work(graph, call)}


def _decoder_floors(graph: ir.Graph, case: Case, engines: Engines) -> dict[str, Work]:
    """A prompt in one piece; a token in the middle of the answer, which is the mean: the cache grows by one a token."""
    floors = {"prefill": count_work(graph, decoder_call([0], case.prompt))}
    if case.generate > 1:
        middle = case.prompt + (case.generate - 2) // 2
        floors["time_between_tokens"] = count_work(graph, decoder_call([middle] * case.batch, 1))
    return floors


def load_graph(engines: Engines, stage: str) -> ir.Graph:
    """The graph in the engines' folder, or, where the backend keeps none, traced on the meta device."""
    path = engines.folder / f"{stage}.onnx"
    if path.is_file():
        return ir.load(path).graph
    from qwen2vl_trt.export.onnx_model import model_graphs
    from qwen2vl_trt.export.trace import trace

    dtypes = {"vision": engines.precision.vision, "decoder": engines.precision.decoder}
    graphs = {graph.name: graph for graph in model_graphs(engines.checkpoint, dtypes["vision"], dtypes["decoder"])}
    return trace(graphs[stage], dtypes[stage]).graph
