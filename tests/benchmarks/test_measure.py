import math

import numpy as np
import pytest

from qwen2vl_trt.benchmarks.measure import PERCENTILES, percentile, statistics_of


def trtexec(ordered, number):
    """``findPercentile`` as its source has it, in exact arithmetic."""
    excluded = math.floor((100 - number) * len(ordered) / 100)
    return ordered[max(len(ordered) - 1 - excluded, 0)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 19, 20, 21, 99, 100, 101, 1000])
def test_percentiles_are_trtexecs_and_numpys_inverted_cdf(count):
    ordered = sorted(np.random.default_rng(count).exponential(size=count).tolist())
    for number in (1, 50, *PERCENTILES, 100):
        found = percentile(ordered, number)
        assert found == trtexec(ordered, number)
        assert found == np.percentile(ordered, number, method="inverted_cdf")


def test_percentiles_of_1_to_100():
    ordered = list(range(1, 101))
    assert [percentile(ordered, number) for number in PERCENTILES] == [90, 95, 99]
    assert [percentile(ordered[:10], number) for number in PERCENTILES] == [9, 10, 10]


def test_statistics_of_samples_in_any_order():
    found = statistics_of([4.0, 1.0, 2.0, 9.0])
    assert [found[name] for name in ("count", "min", "max", "mean", "median")] == [4, 1.0, 9.0, 4.0, 3.0]
    assert statistics_of([3.0, 1.0, 2.0])["median"] == 2.0
