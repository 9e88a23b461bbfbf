"""Scoring, on hand-made answers, and what `eval` prints."""

from __future__ import annotations

import json

import pytest

from qwen2vl_trt.tiny import evaluation
from qwen2vl_trt.tiny.evaluation import evaluate, score
from qwen2vl_trt.tiny.scenes import Scene, held_out_scenes


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "per_digit"),
    [
        ("314", "314", 100, 100),
        (" 314\n", "314", 100, 100),
        ("315", "314", 0, 200 / 3),
        ("14", "314", 0, 0),
        ("3145", "314", 0, 100),
        ("", "314", 0, 0),
        ("none", "314", 0, 0),
        ("first image: 12, second image: 345", "first image: 12, second image: 345", 100, 100),
        ("first image: 1, second image: 345", "first image: 12, second image: 345", 0, 80),
        ("first image: 12", "first image: 12, second image: 345", 0, 40),
    ],
)
def test_score_of_one_answer(answer: str, reference: str, exact: float, per_digit: float) -> None:
    result = score([answer], [reference])
    assert (result.exact, result.per_digit, result.cases) == (exact, pytest.approx(per_digit), 1)


def test_score_weighs_cases_and_digits() -> None:
    result = score(["1", "2345"], ["1", "2346"])
    assert result.exact == 50
    assert result.per_digit == pytest.approx(80)


def test_score_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="argument"):
        score(["1"], ["1", "2"])


def test_evaluate_asks_every_task_in_batches() -> None:
    sizes = []

    def answer(scenes: list[Scene]) -> list[str]:
        sizes.append(len(scenes))
        return [scene.answer if scene.task != "video" else "?" for scene in scenes]

    scores = evaluate(answer, cases=5, seed=3, batch_size=4)
    assert {task: result.exact for task, result in scores.items()} == {
        "read": 100,
        "count": 100,
        "two_images": 100,
        "video": 0,
    }
    assert sizes == [4, 1] * 4


def test_cases_do_not_depend_on_their_number() -> None:
    few, many = held_out_scenes("read", 3, seed=1), held_out_scenes("read", 6, seed=1)
    assert [scene.answer for scene in few] == [scene.answer for scene in many[:3]]


@pytest.mark.parametrize("as_json", [True, False])
def test_a_part_of_the_tasks_does_not_look_whole(monkeypatch, capsys, as_json):
    """Ctrl-C in the second task of four."""

    def answer(pipeline, scenes):
        if asked:
            raise KeyboardInterrupt
        asked.append(scenes)
        return [""] * len(scenes)

    asked: list[object] = []
    monkeypatch.setattr(evaluation, "answer_scenes", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluation.print_accuracy(None, 2, 0, as_json)
    out = capsys.readouterr().out
    if as_json:
        found = json.loads(out)
        assert (set(found), found["interrupted"]) == ({"read", "interrupted"}, True)
    else:
        assert "held-out digits, interrupted" in out
