"""The timeline against what Perfetto demands of a Chrome trace, and against the work that was done."""

import json
import math
import time
from collections import defaultdict
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from benchmarks.subjects import engines as our_engines
from benchmarks.subjects.engines import EngineOptions, PipelineSubject
from benchmarks.subjects.shapes import Limits, Shape, cases
from benchmarks.subjects.stages import Stage
from benchmarks.subjects.timeline import GPU, HOST, REQUESTS, SLOTS, Timeline
from engines.backends import find_backend
from engines.build import build_engines
from engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from runtime.backends.runners import open_engines

PROFILE = BuildProfile(min_hw_dims=4, max_hw_dims=200, max_batch_size=2, max_input_len=100, max_seq_len=140)


def check_trace(trace):
    """Valid, and slices of a track nest; returns the slices of each track."""
    assert json.loads(json.dumps(trace)) == trace
    tracks, named = defaultdict(list), set()
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            named.add((event["name"], event["pid"], event["tid"]))
        else:
            assert event["ph"] == "X"
            assert math.isfinite(event["ts"])
            assert event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append(event)
    for (group, track), slices in tracks.items():
        assert {("process_name", group, 0), ("thread_name", group, track)} <= named
        open_until = []
        for event in slices:  # in the order of the file, as Perfetto needs it for slices that begin together
            start, end = round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], event
            open_until.append(end)
    return tracks


def names(slices):
    return [event["name"] for event in slices]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Four requests, two at a time; prompts of 22 tokens in chunks of 16."""
    folder = tmp_path_factory.mktemp("timeline")
    build_engines(resolve_model("tiny"), *find_backend("torch", "fp32"), PROFILE, folder)
    (case,) = cases(
        ["pipeline"],
        [Shape.parse("56x84,batch:2,generate:3")],
        Limits(PROFILE, open_engines(folder).checkpoint.config.vision),
    )
    subject = PipelineSubject(EngineOptions(folder, "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        whole = our_engines.Pipeline
        patch.setattr(our_engines, "Pipeline", lambda engines, **options: whole(engines, max_num_tokens=16, **options))
        return subject.trace(case)


def test_every_stage_of_every_request(trace):
    tracks = check_trace(trace)
    host = [name for (group, _), slices in tracks.items() if group == HOST for name in names(slices)]
    assert {group for group, _ in tracks} == {HOST, SLOTS, REQUESTS}  # no GPU, no track of one
    assert host.count("load") == 4  # by threads of their own, while the rest goes on
    assert set(host) == {"load", "preprocess", "vision", "prefill chunk", "decode step", "sample"}
    slots = [tracks[SLOTS, track] for track in (1, 2)]
    assert all("decode step" in names(slot) for slot in slots)
    chunks = [event["args"] for slot in slots for event in slot if event["name"] == "prefill chunk"]
    assert len(chunks) == host.count("prefill chunk") > 4
    assert max(chunk["tokens"] for chunk in chunks) <= 16
    assert sum(chunk["tokens"] for chunk in chunks) == 4 * 22


def test_a_request_is_its_wait_and_its_answer(trace):
    tracks = check_trace(trace)
    for number in range(1, 5):
        whole, first, answer = tracks[REQUESTS, number]
        assert names((whole, first, answer)) == [f"request {number}", "to the first token", "answer"]
        assert (whole["args"], first["args"]) == ({"tokens": 3}, {"prompt tokens": 22})
        assert whole["dur"] == pytest.approx(first["dur"] + answer["dur"], abs=0.002)
        assert 0 < answer["dur"] < whole["dur"]
    began = [tracks[REQUESTS, number][0]["ts"] for number in range(1, 5)]
    assert began == sorted(began)
    assert tracks[HOST, 1][0]["ts"] >= began[0] >= 0  # the warm-up is left out


class FakeEvent:
    """Of a GPU that begins and ends a call 1 ms after the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3 + 1


def test_a_gpu_has_a_track_of_its_own(monkeypatch):
    waits = []
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    streams = [SimpleNamespace(cuda_stream=number) for number in (7, 9)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    timeline = Timeline(torch.device("cuda"))
    before = len(waits)
    with timeline(Stage("vision")), timeline(Stage("preprocess")):
        pass
    with timeline(Stage("decode", range(1, 3), {"slots": 2})):
        pass
    streams.reverse()
    with timeline(Stage("vision")):
        pass
    with timeline(Stage("load")):  # on a thread of the host, at any time
        pass
    assert len(waits) == before  # nothing is waited for while it is recorded
    tracks = check_trace(timeline.as_dict())
    assert names(tracks[HOST, 1]) == ["vision", "preprocess", "decode step", "vision", "load"]
    assert names(tracks[GPU, 1]) == ["vision", "preprocess", "decode step"]
    assert names(tracks[GPU, 2]) == ["vision"]
    assert names(tracks[SLOTS, 2]) == names(tracks[SLOTS, 3]) == ["decode step"]
    for host, gpu in zip(tracks[HOST, 1], tracks[GPU, 1]):
        assert gpu["ts"] - host["ts"] == pytest.approx(1000)
