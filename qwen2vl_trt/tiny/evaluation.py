"""Scenes as requests: held-out ones to score the answers, training ones to calibrate FP8 with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.engines.tables import print_table, stdout_console
from qwen2vl_trt.runtime.inputs.video import Video
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams

from .scenes import TASKS, Scene, held_out_scenes

_BATCH_SIZE = 100
_MAX_TOKENS = 64  # the longest reference has 40

_TITLES = {"read": "read an image", "count": "count the digits", "two_images": "two images", "video": "read a video"}


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


def request_of(scene: Scene) -> Request:
    """What a pipeline is asked."""
    return Request(scene.messages, scene.images, [Video(frames, fps) for frames, fps in scene.videos])


def answer_scenes(pipeline: Pipeline, scenes: list[Scene]) -> list[str]:
    """The pipeline's greedy answer to each scene."""
    greedy = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, repetition_penalty=1.0)
    return [output.text for output in pipeline.generate([request_of(scene) for scene in scenes], greedy)]


def print_accuracy(pipeline: Pipeline, cases: int, seed: int, as_json: bool) -> None:
    """Ask held-out scenes of every task and print the scores on stdout; progress goes to stderr.

    Those of the tasks that are over are printed even if Ctrl-C or an error ends the rest.

    Args:
        pipeline: what answers.
        cases: scenes a task.
        seed: chooses the scenes.
        as_json: one JSON object by task instead of a table; with ``"interrupted": true`` where tasks are missing.
    """
    scores: dict[str, Score] = {}
    try:
        with progress_bar(lines=True) as progress:
            asked = progress.add_task("held-out scenes", total=cases * len(TASKS))

            def answer(scenes: list[Scene]) -> list[str]:
                answers = answer_scenes(pipeline, scenes)
                progress.advance(asked, len(scenes))
                return answers

            for task in TASKS:
                scores |= evaluate(answer, (task,), cases, seed, _BATCH_SIZE)
    finally:
        if scores and as_json:
            ended = {} if len(scores) == len(TASKS) else {"interrupted": True}
            print(json.dumps({task: asdict(score) for task, score in scores.items()} | ended))
        elif scores:
            print_table(_table(scores), stdout_console())


def _table(scores: dict[str, Score]) -> Table:
    ended = "" if len(scores) == len(TASKS) else ", interrupted"
    table = Table("task", title=f"held-out digits{ended}")
    for column in ("exact", "by digit", "cases"):
        table.add_column(column, justify="right")
    for task, score in scores.items():
        table.add_row(_TITLES[task], f"{score.exact:.1f}%", f"{score.per_digit:.1f}%", f"{score.cases:,}")
    return table
