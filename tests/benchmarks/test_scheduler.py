"""`bench scheduler`: its counts are promises, its times are only printed."""

import json

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
        scheduler.measure_revision("nonsense")
