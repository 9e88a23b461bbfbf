"""The timeline against what Perfetto demands of a Chrome trace, and against the work that was done."""

import json
import math
import threading
import time
from collections import defaultdict
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt.benchmarks import engines as our_engines
from qwen2vl_trt.benchmarks.cases import Limits, Shape, cases
from qwen2vl_trt.benchmarks.engines import EngineOptions, EngineSystem
from qwen2vl_trt.benchmarks.plots import save_timeline
from qwen2vl_trt.benchmarks.timeline import GPU, HOST, REQUESTS, SLOTS, Timeline
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.plots import COLORS
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.observer import Stage
from qwen2vl_trt.runtime.request import Output

PROFILE = BuildProfile(
    min_hw_dims=4, max_hw_dims=200, max_batch_size=2, max_num_seqs=2, max_input_len=100, max_seq_len=140
)


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
    system = EngineSystem(EngineOptions(folder, "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        whole = our_engines.Pipeline
        patch.setattr(
            our_engines,
            "Pipeline",
            lambda engines, options, **more: whole(engines, replace(options, max_num_tokens=16), **more),
        )
        return system.trace(case)


def test_every_stage_of_every_request(trace):
    tracks = check_trace(trace)
    host = [name for (group, _), slices in tracks.items() if group == HOST for name in names(slices)]
    assert {group for group, _ in tracks} == {HOST, SLOTS, REQUESTS}  # no GPU, no track of one
    assert host.count("load") == 4  # by threads of their own, while the rest goes on
    assert set(host) - {"wait for media"} == {
        "load",
        "embed",
        "preprocess",
        "vision",
        "prefill chunk",
        "decode step",
        "sample",
    }
    slots = [tracks[SLOTS, track] for track in (1, 2)]
    assert all("decode step" in names(slot) for slot in slots)
    chunks = [event["args"] for slot in slots for event in slot if event["name"] == "prefill chunk"]
    assert len(chunks) >= host.count("prefill chunk") > 4  # a call is shared, by answers too
    assert max(chunk["tokens"] for chunk in chunks) <= 16
    assert sum(chunk["tokens"] for chunk in chunks if chunk["after"] < 22) == 4 * 22


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


def test_whose_a_slice_is(trace):
    """What each request says of itself holds for the slices that name it."""
    tracks = check_trace(trace)
    began, first, ended = {}, {}, {}
    for number in range(1, 5):
        whole, prompt, _ = tracks[REQUESTS, number]
        began[number], first[number] = whole["ts"], prompt["ts"] + prompt["dur"]
        ended[number] = whole["ts"] + whole["dur"]
    host = [event for (group, _), slices in tracks.items() if group == HOST for event in slices]
    for name in ("load", "embed", "preprocess", "vision", "prefill chunk"):
        slices = [event for event in host if event["name"] == name]
        assert sorted({number for event in slices for number in event["args"]["requests"]}) == [1, 2, 3, 4]
        for event in slices:
            for number in event["args"]["requests"]:
                assert began[number] <= event["ts"]
                if name != "prefill chunk":  # an answer may share a call with another's prompt
                    assert event["ts"] + event["dur"] <= first[number]
    loads = [event["args"]["requests"] for event in host if event["name"] == "load"]
    assert sorted(loads) == [[1], [2], [3], [4]]
    for slot in (1, 2):
        steps = [event for event in tracks[SLOTS, slot] if event["name"] == "decode step"]
        assert {len(event["args"]["requests"]) for event in steps} == {1}
        for event in steps:
            (number,) = event["args"]["requests"]
            assert first[number] <= event["ts"] <= ended[number]
    tokens = [event["args"]["requests"][0] for slot in (1, 2) for event in tracks[SLOTS, slot]]
    assert all(tokens.count(number) >= 2 + 2 for number in range(1, 5))  # chunks, and a step each after the first token


def colors(path):
    """Of a picture's pixels, how often each, as #rrggbb."""
    with Image.open(path) as picture:
        pixels, counts = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    return {"#{:02x}{:02x}{:02x}".format(*pixel): count for pixel, count in zip(pixels, counts)}


def test_a_picture_has_each_request_in_its_colour(trace, tmp_path):
    save_timeline(trace, "tiny", tmp_path / "whole.png")
    whole = colors(tmp_path / "whole.png")
    assert all(whole.get(color, 0) > 500 for color in COLORS[:4])
    assert not set(COLORS[4:]) & set(whole)
    fewer = [e for e in trace["traceEvents"] if e["name"] == "thread_name" or 2 not in e["args"].get("requests", [])]
    save_timeline({"traceEvents": fewer}, "tiny", tmp_path / "fewer.png")
    fewer = colors(tmp_path / "fewer.png")
    assert fewer[COLORS[1]] < whole[COLORS[1]]  # of the second request only its own line is left


def test_a_picture_has_rows_for_streams(trace, tmp_path):
    """The host's slices stand for a GPU's."""
    on_gpu = [{**event, "pid": GPU} for event in trace["traceEvents"] if (event["pid"], event["tid"]) == (HOST, 1)]
    save_timeline({"traceEvents": [*trace["traceEvents"], *on_gpu]}, "a GPU", tmp_path / "gpu.png")
    save_timeline(trace, "a CPU", tmp_path / "cpu.png")
    with_gpu, without = colors(tmp_path / "gpu.png"), colors(tmp_path / "cpu.png")
    assert all(with_gpu[color] > without[color] for color in COLORS[:4])


class FakeEvent:
    """Of a GPU that begins and ends a call 1 ms after the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3 + 1


def ended_at_once(stage):
    with stage:
        pass


def test_a_gpu_has_a_track_of_its_own(monkeypatch):
    waits, stream = [], ["caller's"]
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream[0])
    timeline = Timeline(torch.device("cuda"))
    before = len(waits)
    output = Output()
    stream[0] = "side"
    with timeline(Stage("vision")), timeline(Stage("preprocess")):
        pass
    stream[0] = "caller's"
    thread = threading.Thread(target=lambda: ended_at_once(timeline(Stage("load"))))
    thread.start()
    thread.join()
    with timeline(Stage("decode", [output], [Chunk(1, 5, 1)])):
        pass
    output.cancel()
    timeline.requests = [output]
    assert len(waits) == before  # nothing is waited for while it is recorded
    tracks = check_trace(timeline.as_dict())
    assert names(tracks[HOST, 1]) == ["vision", "preprocess", "decode step"]
    assert names(tracks[HOST, 2]) == ["load"]  # which has no events: they would lie among the caller's
    assert names(tracks[GPU, 1]) == ["decode step"]
    assert names(tracks[GPU, 2]) == ["vision", "preprocess"]  # beside the caller's stream, on a track of its own
    assert names(tracks[SLOTS, 2]) == ["decode step"]
    assert (SLOTS, 3) not in tracks  # of nobody
    for host, gpu in zip(tracks[HOST, 1], [*tracks[GPU, 2], *tracks[GPU, 1]]):
        assert gpu["ts"] - host["ts"] == pytest.approx(1000)
