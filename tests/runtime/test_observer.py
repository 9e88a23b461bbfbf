"""Who observes a pipeline sees every stage of every request, on the thread that runs it."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest

from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=200, max_batch_size=2, max_num_seqs=2, max_input_len=100, max_seq_len=140
)


@pytest.fixture
def observed(tmp_path):
    """A pipeline, and the stages that it has run with their threads."""
    build_engines(resolve_model("tiny"), *find_backend("torch", "fp32"), PROFILE, tmp_path)
    stages = []

    @contextmanager
    def observe(stage):
        yield
        stages.append((stage, threading.current_thread()))

    return Pipeline(open_engines(tmp_path, "cpu"), observe=observe), stages


def test_every_stage_of_every_request(observed):
    pipeline, stages = observed
    requests = [Request("Digits?", [np.full((56, 84, 3), shade, np.uint8)]) for shade in (0, 100)]
    outputs = pipeline.generate(requests, SamplingParams(max_tokens=3, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [3, 3]
    by_name = {
        name: [stage for stage, _ in stages if stage.name == name] for name, _ in ((s.name, t) for s, t in stages)
    }
    assert {"load", "embed", "preprocess", "vision", "prefill", "decode", "sampling"} <= set(by_name)
    embedded = {
        key: output for stage in by_name["embed"] for key, output in zip(stage.media, stage.outputs, strict=True)
    }
    assert {key for stage in by_name["load"] for key in stage.media} == set(embedded)
    assert sorted(map(id, embedded.values())) == sorted(map(id, outputs))
    for output in outputs:
        chunks = [
            chunk
            for name in ("prefill", "decode")
            for stage in by_name[name]
            for one, chunk in zip(stage.outputs, stage.chunks, strict=True)
            if one is output
        ]
        assert sum(chunk.length for chunk in chunks if chunk.start < output.prompt_tokens) == output.prompt_tokens
        assert [chunk.length for chunk in chunks if chunk.start >= output.prompt_tokens] == [
            1,
            1,
        ]  # the last is not fed
    assert {thread for stage, thread in stages if stage.name != "load"} == {threading.main_thread()}


def test_answers_share_a_step(observed):
    """Of texts alone, which are ready at once: of two images the first to be loaded may have its answer by then."""
    pipeline, stages = observed
    outputs = pipeline.generate([Request("Who are you?"), Request("Hi")], SamplingParams(max_tokens=3, ignore_eos=True))
    shared = [stage.outputs for stage, _ in stages if stage.name == "decode"]
    assert [list(map(id, each)) for each in shared] == [list(map(id, outputs))] * 2


def test_an_error_passes_through(observed):
    pipeline, stages = observed
    (output,) = pipeline.generate(Request("Digits?", [b"no picture"]))
    assert "image 1" in str(output.error)
    assert not stages or {stage.name for stage, _ in stages} <= {"wait"}
