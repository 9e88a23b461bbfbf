"""What the workloads do otherwise where the host waits for a GPU."""

import threading

import pytest
import torch

from qwen2vl_trt.benchmarks import engines
from qwen2vl_trt.benchmarks.cases import Limits, Shape, cases
from qwen2vl_trt.benchmarks.engines import PIPELINE_STAGES, EngineOptions, EngineSystem, StageClock
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.observer import Stage


def test_threads_that_load_do_not_wait(monkeypatch):
    """A wait for the device fails while another thread captures a graph, and takes the graph with it."""
    waits = []
    monkeypatch.setattr(engines, "synchronize", waits.append)
    clock = StageClock(torch.device("cuda"))

    def load():
        with clock(Stage("load")):
            pass

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert waits == []
    assert not clock.seconds
    for name in ("wait", "vision", "decode"):
        with clock(Stage(name)):
            pass
    assert waits == [torch.device("cuda")] * 3
    assert set(clock.seconds) == {"preprocess", "vision", "decode"}


def test_shares_are_of_a_run_of_their_own(tmp_path, monkeypatch):
    """The samples are of a pipeline whose stages nobody observes."""
    profile = BuildProfile(
        min_hw_dims=4, max_hw_dims=200, max_batch_size=2, max_num_seqs=2, max_input_len=100, max_seq_len=140
    )
    build_engines(resolve_model("tiny"), *find_backend("torch", "fp32"), profile, tmp_path)
    limits = Limits(profile, open_engines(tmp_path).checkpoint.config.vision)
    (case,) = cases(["pipeline"], [Shape.parse("56x84,batch:2,generate:3")], limits)
    workload = EngineSystem(EngineOptions(tmp_path, "cpu")).make("pipeline")
    workload._waits = True
    workload.load(case)
    workload.iterate(1)
    assert not workload.clock.seconds
    turn = workload.run(2)
    assert len(turn.samples) == 4
    assert set(turn.stages) == {*PIPELINE_STAGES}
    assert sum(turn.stages.values()) == pytest.approx(turn.seconds)
    assert min(turn.stages[stage] for stage in ("vision", "prefill", "decode", "sampling")) > 0
