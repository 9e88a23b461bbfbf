"""The accuracy of a pipeline on held-out digits, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.engines.tables import print_table, stdout_console
from qwen2vl_trt.runtime.inputs.video import Video
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams

from .evaluation import Score, evaluate
from .scenes import TASKS, Scene

BATCH_SIZE = 100
MAX_TOKENS = 64  # the longest reference has 40

_TITLES = {"read": "read an image", "count": "count the digits", "two_images": "two images", "video": "read a video"}


def print_accuracy(pipeline: Pipeline, cases: int, seed: int, as_json: bool) -> None:
    """Ask held-out scenes of every task and print the scores on stdout; a progress bar goes to a terminal's stderr.

    Those of the tasks that are over are printed even if Ctrl-C or an error ends the rest.

    Args:
        pipeline: what answers.
        cases: scenes a task.
        seed: chooses the scenes.
        as_json: one JSON object by task instead of a table; with ``"interrupted": true`` where tasks are missing.
    """
    scores: dict[str, Score] = {}
    try:
        with progress_bar() as progress:
            asked = progress.add_task("held-out scenes", total=cases * len(TASKS))

            def answer(scenes: list[Scene]) -> list[str]:
                answers = answer_scenes(pipeline, scenes)
                progress.advance(asked, len(scenes))
                return answers

            for task in TASKS:
                scores |= evaluate(answer, (task,), cases, seed, BATCH_SIZE)
    finally:
        if scores and as_json:
            ended = {} if len(scores) == len(TASKS) else {"interrupted": True}
            print(json.dumps({task: asdict(score) for task, score in scores.items()} | ended))
        elif scores:
            print_table(_table(scores), stdout_console())


def answer_scenes(pipeline: Pipeline, scenes: list[Scene]) -> list[str]:
    """The pipeline's greedy answer to each scene."""
    requests = [
        Request(scene.messages, scene.images, [Video(frames, fps) for frames, fps in scene.videos]) for scene in scenes
    ]
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, repetition_penalty=1.0)
    return [output.text for output in pipeline.generate(requests, greedy)]


def _table(scores: dict[str, Score]) -> Table:
    ended = "" if len(scores) == len(TASKS) else ", interrupted"
    table = Table("task", title=f"held-out digits{ended}")
    for column in ("exact", "by digit", "cases"):
        table.add_column(column, justify="right")
    for task, score in scores.items():
        table.add_row(_TITLES[task], f"{score.exact:.1f}%", f"{score.per_digit:.1f}%", f"{score.cases:,}")
    return table
