"""Runs every runner over every case and compares the outputs.

Runners run one after another, each over all cases, and only one of them is active at a time: memory holds one model,
and one case's outputs of two runners. The reference's outputs wait on the disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.logger import G_LOGGER
from safetensors.numpy import load_file, save_file

from .figures import Agreement, Figures, measure, merge
from .inputs import FORCED, Feed
from .tolerance import DECODE_LOGITS, GREEDY, LOGITS, model_order

Measured = Figures | Agreement


@dataclass(frozen=True)
class Row:
    """One runner against the reference: figures by output of each case, tokens under ``greedy_ids``."""

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
    """Let the reference answer every case greedily, the others take its ``greedy_ids``, and compare every output.

    Yields a row of each of the others, once it has answered all cases; ``on_case`` gets a runner's name before each.
    """
    with tempfile.TemporaryDirectory(prefix="qwen2vl-compare-") as folder, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        stored: list[Path] = []
        forced: list[Feed] = []
        for (outputs, _), feed in zip(_answers(reference, feeds, on_case), feeds):
            stored.append(Path(folder) / f"{len(stored)}.safetensors")
            save_file({name: np.ascontiguousarray(array) for name, array in outputs.items()}, stored[-1])
            forced.append({**feed, FORCED: outputs[GREEDY]})
        for runner in others:
            cases, seconds = [], 0.0
            for (outputs, taken), path in zip(_answers(runner, forced, on_case), stored):
                cases.append(_compare(load_file(path), outputs))
                seconds += taken
            yield Row(runner.name, tuple(cases), seconds)


def compare_inputs(expected: Iterable[Feed], found: Iterable[Feed]) -> Row:
    """The same of what is made before the model, case by case."""
    began = time.perf_counter()
    cases: list[dict[str, Measured]] = [
        {name: measure(array, reference[name], name) for name, array in ours.items()}
        for reference, ours in zip(expected, found)
    ]
    return Row("preprocessor", tuple(cases), time.perf_counter() - began)


def _answers(runner: BaseRunner, feeds: Sequence[Feed], on_case: Callable[[str], None]) -> Iterator[tuple[Feed, float]]:
    """Outputs and seconds of each case."""
    with runner:
        for feed in feeds:
            on_case(runner.name)
            yield runner.infer(feed), runner.last_inference_time()


def _compare(expected: Feed, found: Feed) -> dict[str, Measured]:
    """Figures by output; tokens are the choices of ``found`` beside those that it was forced to take."""
    figures: dict[str, Measured] = {
        name: measure(found[name], array, name) for name, array in expected.items() if name in found and name != GREEDY
    }
    logits = [found[name] for name in (LOGITS, DECODE_LOGITS) if name in found]
    figures[GREEDY] = Agreement.of(np.concatenate(logits).argmax(-1).tolist(), expected[GREEDY].tolist())
    return figures
