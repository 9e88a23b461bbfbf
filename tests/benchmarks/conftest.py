"""Workers without a process: what they are given and what they answer still goes through pickle."""

import pickle

import pytest

import qwen2vl_trt.benchmarks.bench
import qwen2vl_trt.benchmarks.comparisons
import qwen2vl_trt.benchmarks.operators


class WorkerHere:
    """In the place of :class:`qwen2vl_trt.benchmarks.workers.Worker`, whose own tests start real processes."""

    def __init__(self, name, setup):
        self.name, self._target = name, pickle.loads(pickle.dumps(setup))()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, method, *arguments):
        answer = getattr(self._target, method)(*pickle.loads(pickle.dumps(arguments)))
        return pickle.loads(pickle.dumps(answer))


@pytest.fixture
def no_processes(monkeypatch):
    """Each costs seconds of imports."""
    for module in (
        qwen2vl_trt.benchmarks.bench,
        qwen2vl_trt.benchmarks.operators,
        qwen2vl_trt.benchmarks.comparisons,
    ):
        monkeypatch.setattr(module, "Worker", WorkerHere)


@pytest.fixture
def small_rates(monkeypatch):
    """Of small matrices: no test compares a rate with anything but another of its run."""
    monkeypatch.setattr("qwen2vl_trt.benchmarks.roofline._SIZES", (1 << 20, 1 << 22))
    monkeypatch.setattr("qwen2vl_trt.benchmarks.roofline._PRODUCTS", ((64, 256, 256),))
