"""Errors by their definitions, on numbers small enough to check by hand."""

import math

import numpy as np
import pytest

from qwen2vl_trt.accuracy.figures import Agreement, measure, merge
from qwen2vl_trt.errors import EngineError


def test_figures_are_what_the_definitions_say():
    found = measure(np.array([[1.0, -2.0], [3.5, 4.0]]), np.array([[1.0, -2.5], [3.5, 5.0]]), "x")
    assert (found.max_absolute, found.mean_absolute) == (1.0, 0.375)
    assert found.max_relative == 1 / 5
    assert found.mean_relative == pytest.approx(0.375 / 3)
    a, b = np.array([1, -2, 3.5, 4]), np.array([1, -2.5, 3.5, 5])
    assert found.cosine == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    assert found.values == 4


def test_low_precision_is_not_summed_in_low_precision():
    ones = np.ones(1 << 20, np.float16)
    assert measure(ones, ones, "x").scale == 1


def test_equal_outputs_have_no_error():
    found = measure(np.array([1.0, 2.0]), np.array([1.0, 2.0]), "x")
    assert found.max_absolute == found.mean_relative == 0
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize(("found", "cosine", "error"), [(0.0, 1.0, 0.0), (1.0, 0.0, math.inf)])
def test_a_reference_of_zeros(found, cosine, error):
    figures = measure(np.full(3, found), np.zeros(3), "x")
    assert (figures.cosine, figures.max_relative, figures.mean_relative) == (cosine, error, error)


def test_other_shapes_are_refused():
    with pytest.raises(EngineError, match=r"logits is \[2, 3\], the reference has \[3, 2\]"):
        measure(np.zeros((2, 3)), np.zeros((3, 2)), "logits")


def test_merged_cases_are_the_worst_and_the_mean_over_all_values():
    parts = [
        measure(np.array([1.0, 1.5]), np.array([1.0, 1.0]), "x"),
        measure(np.array([8.0, 8.0, 8.0, 10.0, 8.0, 8.0]), np.full(6, 8.0), "x"),
    ]
    whole = merge(parts)
    assert (whole.max_absolute, whole.max_relative) == (2.0, 0.5)
    assert whole.mean_absolute == pytest.approx(2.5 / 8)
    assert whole.mean_relative == pytest.approx(2.5 / 50)
    assert whole.cosine == min(part.cosine for part in parts)
    assert whole.values == 8


@pytest.mark.parametrize("order", [1, -1])
def test_a_case_that_is_not_a_number_is_not_lost_among_others(order):
    parts = [measure(np.array([math.nan]), np.ones(1), "x"), measure(np.ones(1), np.ones(1), "x")][::order]
    assert math.isnan(merge(parts).max_absolute)


@pytest.mark.parametrize(
    ("found", "expected"),
    [([4, 5, 6], Agreement(3, 3, None)), ([4, 0, 6], Agreement(2, 3, 1)), ([0, 0, 0], Agreement(0, 3, 0))],
)
def test_agreement_is_how_many_tokens_and_the_first_that_differs(found, expected):
    assert Agreement.of(found, [4, 5, 6]) == expected
