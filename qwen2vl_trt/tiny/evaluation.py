"""Held-out accuracy of anything that answers scenes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .digits import load_split
from .scenes import TASKS, Scene, evaluation_scene


@dataclass(frozen=True)
class Score:
    """Accuracy in one task.

    Attributes:
        exact: percent of answers that equal the reference.
        per_digit: percent of the references' digits that stand at the same place among the answer's digits.
        cases: number of scenes asked.
    """

    exact: float
    per_digit: float
    cases: int


def held_out_scenes(task: str, cases: int, seed: int) -> list[Scene]:
    """Draw ``cases`` scenes of held-out digits; the first n of them do not depend on ``cases``."""
    digits = load_split()[1]
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    return [evaluation_scene(rng, digits, task, number) for number in range(cases)]


def _digits(text: str) -> str:
    return "".join(character for character in text if character in "0123456789")


def score(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Compare answers with references, case by case.

    Digits are compared position by position within each comma-separated part, so that a wrong length in the first
    part of an answer does not spoil the second.
    """
    exact = right = total = 0
    for answer, reference in zip(answers, references, strict=True):
        exact += answer.strip() == reference
        parts = reference.split(",")
        given = answer.split(",")
        for number, part in enumerate(parts):
            wanted = _digits(part)
            total += len(wanted)
            if number < len(given):
                right += sum(a == b for a, b in zip(_digits(given[number]), wanted, strict=False))
    return Score(100 * exact / max(len(references), 1), 100 * right / max(total, 1), len(references))


def evaluate(
    answer: Callable[[list[Scene]], list[str]],
    tasks: Sequence[str] = TASKS,
    cases: int = 1000,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, Score]:
    """Ask held-out scenes and score the answers.

    Args:
        answer: returns one answer for each scene it is given.
        tasks: some of :data:`qwen2vl_trt.tiny.scenes.TASKS`.
        cases: scenes a task.
        seed: chooses the scenes.
        batch_size: scenes handed to ``answer`` at a time.
    """
    scores = {}
    for task in tasks:
        asked = held_out_scenes(task, cases, seed)
        answers: list[str] = []
        for start in range(0, cases, batch_size):
            answers += answer(asked[start : start + batch_size])
        scores[task] = score(answers, [scene.answer for scene in asked])
    return scores
