"""Measures an engine folder, and Transformers beside it where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.runtime.backends.runners import Engines, open_engines
from qwen2vl_trt.runtime.preprocessing.preprocessor import PreprocessorSettings

from .cases import Case, Limits, Shape, cases
from .engines import EngineOptions, EngineSystem
from .measure import Measurement, Until, measure
from .operators import Operator, profile_operators
from .roofline import Bound, Rates, bounds_of, measure_rates
from .transformers import TransformersSystem
from .workers import Worker

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""In which Transformers can run."""


@dataclass
class Result:
    """One case.

    Attributes:
        case: what was measured.
        ours: our engines.
        baseline: Transformers beside them, if asked for.
        roofline: by figure; None where a rate that it needs could not be measured.
        streams: inferences at a time.
        operators: time of each, where asked for.
    """

    case: Case
    ours: Measurement
    baseline: Measurement | None = None
    roofline: dict[str, Bound | None] = field(default_factory=dict)
    streams: int = 1
    operators: list[Operator] | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster we are: of the first rate, and of the medians of what both have."""
        if self.baseline is None:
            return {}
        unit = next(iter(self.ours.throughput(self.case)))
        theirs, ours = self.baseline.statistics, self.ours.statistics
        return {unit: self.ours.throughput(self.case)[unit] / self.baseline.throughput(self.case)[unit]} | {
            figure: theirs[figure]["median"] / ours[figure]["median"] for figure in ours if figure in theirs
        }

    def reached(self, figure: str, bound: Bound) -> float:
        """Share of the roofline: the bound over the median, or over the time a call with streams."""
        if self.streams > 1:
            return bound.seconds * len(self.ours.samples) / self.ours.seconds
        return 1e3 * bound.seconds / self.ours.statistics[figure]["median"]


@dataclass(frozen=True)
class Report:
    """Of one run.

    ``ended_by`` is the Ctrl-C or the error before which all of ``results`` were measured; None where there are no more.
    """

    engines: Engines
    rates: Rates
    results: list[Result]
    trace: dict[str, Any] | None = None
    ended_by: BaseException | None = None


def run(
    options: EngineOptions,
    stages: Sequence[str],
    shapes: Sequence[Shape],
    until: Until,
    against: str | None = None,
    profile: bool = False,
    trace: bool = False,
) -> Report:
    """Measure everything, or what there is time for until Ctrl-C or an error.

    Args:
        options: which engines, and how.
        stages: of ``processor``, ``vision``, ``decoder`` and ``pipeline``.
        shapes: what ``--shapes`` says.
        until: when to stop.
        against: precision in which Transformers runs beside us; None alone.
        profile: take the time of every operator, after the rest.
        trace: record a timeline of the last pipeline case, after the rest.

    Raises, if nothing has been measured before:
        EngineError: the engines cannot run here.
        LimitError: a shape outside their profile.
        BenchmarkError: a shape of no stage, or a process that died.
    """
    engines = open_engines(options.folder, options.device)
    config = engines.checkpoint.config
    settings = PreprocessorSettings.from_folder(engines.checkpoint.folder)
    todo = cases(stages, shapes, Limits(engines.manifest.profile, config.vision, settings))
    rates = measure_rates(engines.device, engines.dtype)
    results: list[Result] = []
    timeline, ended_by = None, None
    try:
        with progress_bar(lines=True) as progress:
            task = progress.add_task("measuring", total=len(todo))
            for stage in stages:
                of_stage = [case for case in todo if case.stage == stage]
                for result in _measure(of_stage, options, engines, until, against):
                    results.append(result)
                    progress.update(task, description=f"{stage} {result.case.label}", advance=1)
                if profile:
                    operators = profile_operators(replace(options, streams=1), of_stage)
                    for result, of_case in zip(results[-len(of_stage) :], operators):
                        result.operators = of_case
        if trace:
            with Worker("the timeline", partial(EngineSystem, options)) as worker:
                timeline = worker.call("trace", [case for case in todo if case.stage == "pipeline"][-1])
        rates = rates.best(measure_rates(engines.device, engines.dtype))  # a busy moment hits one of the two at most
        for result in results:
            result.roofline = bounds_of(result.case, config, engines.precision, rates, device=engines.device.type)
    except (KeyboardInterrupt, Exception) as reason:  # raised once what was measured is printed
        if not results:
            raise
        ended_by = reason
    return Report(engines, rates, results, timeline, ended_by)


def _measure(
    of_stage: list[Case], options: EngineOptions, engines: Engines, until: Until, against: str | None
) -> Iterator[Result]:
    """A result of each case, once it is whole."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("our engines", partial(EngineSystem, options)))]
        if against is not None:
            given = (engines.checkpoint.folder, against, PRECISIONS[against], str(engines.device))
            workers.append(stack.enter_context(Worker("Transformers", partial(TransformersSystem, *given))))
        for case in of_stage:
            ours, *others = measure(case, workers, until)
            yield Result(case, ours, others[0] if others else None, streams=options.streams)
