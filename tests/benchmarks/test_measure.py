"""What the head of a report says."""

import math
from functools import partial

import pytest
import torch

from qwen2vl_trt import __version__
from qwen2vl_trt.benchmarks import measure
from qwen2vl_trt.benchmarks.measure import Contender, compete, machine
from qwen2vl_trt.errors import BenchmarkError


def test_versions_where_a_package_is_not_installed():
    """This project may be run from its folder, and then is not."""
    found = machine("numpy", "no-such-package")
    assert found["torch"] == torch.__version__
    assert found["qwen2vl-trt"] == __version__
    assert "numpy" in found
    assert "no-such-package" not in found


def half_a_second(calls, failing):
    """What takes so long, by its own account, and fails in one call."""
    left = iter(range(calls))

    def call():
        if next(left) == failing:
            raise ValueError("no\nsuch kernel")
        return 0.5

    return call


def test_a_contender_that_fails_leaves_the_others_alone(monkeypatch, capsys):
    class Here:
        def __init__(self, name, setup):
            self.name, self._target = name, setup()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def call(self, method):
            try:
                return getattr(self._target, method)()
            except ValueError as error:
                raise BenchmarkError(str(error).splitlines()[-1]) from error  # as a worker's process has it

    monkeypatch.setattr(measure, "Worker", Here)
    rows = [Contender(name, partial(half_a_second, 4, failing)) for name, failing in (("bad", 0), ("good", math.inf))]
    (result,) = compete(rows, 3)
    assert (result.name, result.seconds) == ("good", 0.5)
    assert capsys.readouterr().err == "bad failed: such kernel\n"
    with pytest.raises(BenchmarkError):  # later, its figures would be of fewer repetitions
        compete([Contender("late", partial(half_a_second, 4, 2))], 3)


def test_the_load_that_others_make_is_told(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (6.04, 7.0, 8.0))
    assert machine()["load"] == 6.0
    monkeypatch.delattr("os.getloadavg")
    assert "load" not in machine()
