import sys
import time
from functools import partial
from importlib import import_module

import psutil
import pytest

from qwen2vl_trt.benchmarks.workers import Worker, peak_bytes, reset_peak
from qwen2vl_trt.errors import BenchmarkError, EngineError, MissingDependencyError


def module(name):
    """A worker of a module: its functions are the methods."""
    return Worker(name, partial(import_module, name))


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_calls_and_errors():
    with module("operator") as worker:
        assert worker.call("add", 2, 3) == 5
        with pytest.raises(BenchmarkError, match="in the process of operator: ZeroDivisionError: division"):
            worker.call("truediv", 1, 0)
        assert worker.call("add", 1, 1) == 2  # a failed call leaves it as it was
        running = worker._process.pid
        assert running in children()
    assert running not in children()


def test_an_error_of_this_project_arrives_as_it_is(tmp_path):
    with module("qwen2vl_trt.runtime.backends.runners") as worker, pytest.raises(EngineError, match="holds no engine"):
        worker.call("open_engines", tmp_path)


def test_an_error_of_several_lines_arrives_as_its_first():
    """CUDA's end in advice about compiling PyTorch."""
    with module("builtins") as worker, pytest.raises(BenchmarkError) as raised:
        worker.call("exec", "raise RuntimeError('CUDA error: device-side assert\\nCompile with `TORCH_USE_CUDA_DSA`')")
    assert str(raised.value) == "in the process of builtins: RuntimeError: CUDA error: device-side assert"


def test_a_setup_that_fails_leaves_no_process():
    before = children()
    with module("no_such_package") as worker:
        for _ in range(2):  # it is not tried again
            with pytest.raises(MissingDependencyError, match="the package no_such_package is not installed"):
                worker.call("anything")
    assert children() <= before


def test_a_process_that_dies():
    with module("os") as worker, pytest.raises(BenchmarkError, match="the process of os was killed by signal 6"):
        worker.call("abort")
    with module("os") as worker, pytest.raises(BenchmarkError, match="ended with code 3"):
        worker.call("_exit", 3)


def test_a_process_that_died_begins_again():
    with module("os") as worker:
        with pytest.raises(BenchmarkError, match="killed by signal 6"):
            worker.call("abort")
        assert worker.call("getpid") in children()


def test_a_call_that_does_not_end_is_stopped():
    with module("time") as worker:
        worker.call("sleep", 0)
        stopped = worker._process.pid
        worker.deadline = time.monotonic() + 0.1
        with pytest.raises(BenchmarkError, match=r"^time was stopped after [01] s$"):
            worker.call("sleep", 1000)
        assert stopped not in children()
        worker.deadline = None
        assert worker.call("sleep", 0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak begins anew on Linux alone")
def test_the_peak_of_memory():
    before = peak_bytes()
    taken = bytearray(200_000_000)
    taken[::4096] = b"x" * len(taken[::4096])
    with_it = peak_bytes()
    del taken
    assert with_it >= before - 20_000_000
    assert peak_bytes() > with_it - 20_000_000  # the system counts in batches
    reset_peak()
    assert peak_bytes() < with_it - 100_000_000
