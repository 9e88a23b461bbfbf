"""Runs every runner over every case with Polygraphy's Comparator and keeps the figures.

Runners run one after another, each over all cases, and only one of them is active at a time: memory holds one model,
and one case's outputs of two runners. The reference's outputs wait on the disk.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER
from safetensors.numpy import load_file, save_file

from .figures import Agreement, Figures, measure, merge
from .inputs import FORCED, Feed
from .tolerance import DECODE_LOGITS, GREEDY, LOGITS, model_order

Measured = Figures | Agreement


@dataclass(frozen=True)
class Row:
    """One runner against the reference.

    Attributes:
        name: the runner's.
        cases: figures by output, a case each, in the cases' order; tokens under ``greedy_ids``.
        seconds: that it took over all cases.
    """

    name: str
    cases: tuple[dict[str, Measured], ...]
    seconds: float

    @property
    def outputs(self) -> dict[str, Figures]:
        """Figures of each output over all cases that have it, in the order in which the model computes them."""
        names = sorted({name for case in self.cases for name in case if name != GREEDY}, key=model_order)
        parts = {name: [case[name] for case in self.cases if name in case] for name in names}
        return {name: merge(f for f in found if isinstance(f, Figures)) for name, found in parts.items()}

    @property
    def agreement(self) -> Agreement:
        """Of the greedy tokens of all cases; ``first`` is counted through them."""
        parts = [part for case in self.cases if isinstance(part := case.get(GREEDY), Agreement)]
        first, before = None, 0
        for part in parts:
            if part.first is not None and first is None:
                first = before + part.first
            before += part.tokens
        return Agreement(sum(part.agreeing for part in parts), before, first)


def compare_runners(
    reference: BaseRunner, others: Sequence[BaseRunner], feeds: Sequence[Feed], on_case: Callable[[str], None]
) -> Iterator[Row]:
    """Let the reference answer every case greedily, the others the same tokens, and compare every output.

    Yields a row of each of the others, once it has answered all cases.

    Args:
        reference: gives ``greedy_ids``, which the others are forced to take.
        others: compared with it, one after another.
        feeds: a case each.
        on_case: told a runner's name before each case.
    """
    with tempfile.TemporaryDirectory(prefix="qwen2vl-compare-") as folder, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        stored = [Path(folder) / f"{number}.safetensors" for number in range(len(feeds))]
        forced = []
        for path, feed, outputs in zip(stored, feeds, _outputs(reference, _told(feeds, reference, on_case))):
            save_file({name: np.ascontiguousarray(array) for name, array in outputs.items()}, path)
            forced.append({**feed, FORCED: outputs[GREEDY]})
        for runner in others:
            seconds: list[float] = []
            compare = _comparing(seconds)
            run = Comparator.run([runner], _told(forced, runner, on_case), streaming=True)
            accuracy = Comparator.compare_accuracy([_stored(reference.name, stored), run], compare_func=compare)
            (results,) = accuracy[0].values()
            yield Row(runner.name, tuple(dict(result) for result in results), sum(seconds))


def compare_inputs(reference: BaseRunner, runner: BaseRunner, cases: int) -> Row:
    """The same of what is made before the model: runners that are fed a case's number."""
    feeds = [{"case": np.array([number])} for number in range(cases)]
    seconds: list[float] = []
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        run = Comparator.run([reference, runner], feeds, streaming=True)
        accuracy = Comparator.compare_accuracy(run, compare_func=_comparing(seconds))
    (results,) = accuracy[0].values()
    return Row(runner.name, tuple(dict(result) for result in results), sum(seconds))


def _outputs(runner: BaseRunner, feeds: Iterable[Feed]) -> Iterator[dict[str, np.ndarray]]:
    for results in Comparator.run([runner], feeds, streaming=True):
        yield dict(results[0][1][0].items())


def _told(feeds: Sequence[Feed], runner: BaseRunner, on_case: Callable[[str], None]) -> Iterator[Feed]:
    for feed in feeds:
        on_case(runner.name)
        yield feed


def _stored(name: str, paths: Sequence[Path]) -> Iterator[RunResults]:
    for path in paths:
        result = IterationResult(outputs=load_file(path), runtime=0.0, runner_name=name)
        yield RunResults([(name, [result])])


def _comparing(seconds: list[float]) -> Callable[[IterationResult, IterationResult], OrderedDict[str, Any]]:
    """A comparison function for Polygraphy: the reference's result and another's to figures by output."""

    def compare(expected: IterationResult, found: IterationResult) -> OrderedDict[str, Any]:
        seconds.append(found.runtime)
        figures: OrderedDict[str, Any] = OrderedDict(
            (name, measure(found[name], array, name))
            for name, array in expected.items()
            if name in found and name != GREEDY
        )
        if GREEDY in expected:
            figures[GREEDY] = Agreement.of(_choices(found), expected[GREEDY].tolist())
        return figures

    return compare


def _choices(result: IterationResult) -> list[int]:
    logits = [result[name] for name in (LOGITS, DECODE_LOGITS) if name in result]
    return np.concatenate(logits).argmax(-1).tolist()
