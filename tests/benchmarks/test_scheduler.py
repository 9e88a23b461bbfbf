"""`bench scheduler`: its counts are promises, its times are only printed."""

import json
import subprocess

import pytest

from qwen2vl_trt.benchmarks import scheduler
from qwen2vl_trt.errors import BenchmarkError


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 1), ({"repetition_penalty": 1.05}, 12), ({"temperature": 0.7, "top_k": 50}, 12)],
    ids=["greedy", "repetition penalty", "temperature and top-k"],
)
def test_operators_of_sampling_do_not_grow_with_the_rows(settings, most):
    few, many = (scheduler.sampling_operators(rows, **settings) for rows in (2, 64))
    assert few == many <= most


@pytest.mark.parametrize("packed", [True, False])
def test_four_short_prompts_are_one_call(packed):
    assert scheduler.prompt_calls(packed) == 1


def test_the_table(command):
    code, out, _ = command("bench scheduler", "--steps", 10, "--json")
    figures = {each["name"]: each["value"] for each in json.loads(out)["figures"]}
    assert code == 0
    assert len(figures) == 11
    assert all(value > 0 for value in figures.values())


def test_an_unknown_revision():
    with pytest.raises(BenchmarkError, match="--baseline nonsense: "):
        scheduler.measure_beside("nonsense", 10)


def test_revisions_are_measured_turn_about(monkeypatch):
    values = iter([10.0, 20.0, 70.0, 80.0, 30.0, 40.0])
    checkouts = []

    def run(command, cwd=None, **options):
        if "worktree" in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        checkouts.append(cwd)
        figures = [{"name": "a step", "value": next(values), "unit": "us"}]
        return subprocess.CompletedProcess(command, 0, json.dumps({"figures": figures}), "")

    monkeypatch.setattr(subprocess, "run", run)
    ours, theirs = scheduler.measure_beside("HEAD", 10)
    assert checkouts == [*checkouts[:2]] * 3
    assert checkouts[0] != checkouts[1]
    assert (ours, theirs) == ([scheduler.Figure("a step", 30.0, "us")], [scheduler.Figure("a step", 40.0, "us")])
