"""Many requests over whole pipelines: prefixes shared, pictures that come again, deadlines, failures, and a soak."""

import gc
import json
import math
import time
import tracemalloc
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams
from qwen2vl_trt.errors import CheckpointError, DeadlineError, ExecutionError, LimitError, MediaError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.inputs.clips import VideoLimits
from qwen2vl_trt.tiny.model import config_dict
from qwen2vl_trt.tiny.tokenizer import write_processor_files
from tests.support.bounds import FP32_BEHIND_BOTH
from tests.support.engine_folders import PROFILE, build
from tests.support.models import random_model, relative_error, save_model
from tests.support.requests import answers, clip, picture, random_params, random_request
from tests.support.thorough import often

BACKENDS = ("torch", "onnxruntime")
ONE_BACKEND = pytest.mark.parametrize("make", ["torch"], indirect=True)
"""What happens between the engines is the same for all; tests/runtime/scheduling/test_scheduler.py has each case."""


class Clock:
    """Time that a test moves, or that moves by itself a little at every look."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


@pytest.fixture(scope="module")
def engines(engine_dirs):
    """Loaded engines by backend, for pipelines of a test's own; they share one key-value cache: one at a time."""
    return {backend: open_engines(folder, "cpu") for backend, folder in engine_dirs.items()}


@pytest.fixture(params=BACKENDS)
def make(request, engines):
    """Makes pipelines on each backend in turn."""

    def open_pipeline(clock=time.perf_counter, **options):
        return Pipeline(engines[request.param], PipelineOptions(**options), clock)

    return open_pipeline


@pytest.fixture(scope="module")
def plain(engines):
    """By backend, a pipeline that shares nothing between requests."""
    return {
        backend: Pipeline(engines[backend], PipelineOptions(reuse_prefixes=False, embedding_cache_bytes=0))
        for backend in BACKENDS
    }


def drain(pipeline):
    while pipeline.busy:
        pipeline.step()


def related_request(seed):
    """One of few beginnings (system prompt, images, a clip), one of many ends."""
    rng = np.random.default_rng([seed, 7])
    opening = [
        [],
        [{"role": "system", "content": "You read digits from pictures and answer in as few words as can be."}],
    ]
    images = [picture(int(number)) for number in rng.integers(0, 3, int(rng.integers(0, 3)))]
    videos = [clip(int(rng.integers(2)))] * int(rng.random() < 0.2)
    text = " ".join(
        ["Compare them.", "How many digits are there?", "What is left of the 7?", "Sum?"][: rng.integers(1, 5)]
    )
    text += " and" * int(rng.integers(0, 4))
    parts = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos) + [{"type": "text", "text": text}]
    return Request([*opening[rng.integers(2)], {"role": "user", "content": parts}], images, videos)


# Prefix reuse


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 10_000), min_size=6, max_size=14), chunk=st.sampled_from([7, 64, 512]))
def test_answers_are_the_same_with_prefix_reuse_and_without(engines, plain, seeds, chunk):
    requests, params = [related_request(seed) for seed in seeds], [random_params(seed) for seed in seeds]
    for backend in BACKENDS:
        expected = answers(plain[backend].generate(requests, params))
        pipeline = Pipeline(engines[backend], PipelineOptions(max_num_tokens=chunk))
        for _ in range(2):  # the second time nearly everything is there
            assert answers(pipeline.generate(requests, params)) == expected
        assert pipeline.counters().prompt_tokens_reused > 0


def test_the_same_beginning_is_read_once(make):
    pipeline = make()
    image = picture(3, 140, 140)
    system = {"role": "system", "content": "You are careful. " * 5}
    requests = [
        Request([system, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], [image])
        for text in ("How many?", "Which ones?", "What is the sum?", "Which is the largest?", "Read them.")
    ]
    outputs = pipeline.generate(requests, SamplingParams(max_tokens=3))
    found = pipeline.counters()
    total = sum(output.prompt_tokens for output in outputs)
    assert found.prompt_tokens_computed + found.prompt_tokens_reused == total
    assert found.prompt_tokens_reused == sum(output.reused_tokens for output in outputs)
    assert sorted(output.reused_tokens > 0 for output in outputs) == [False] + 4 * [True]  # whichever was loaded first
    ends = sum(output.prompt_tokens - output.reused_tokens for output in outputs if output.reused_tokens)
    assert ends < 5 * 20  # of prompts of over 50 tokens each
    assert (found.embedding_hits, found.embedding_misses) == (4, 1)
    other = pipeline.generate([replace(requests[0], images=[picture(4, 140, 140)])], SamplingParams(max_tokens=3))[0]
    beside = min(output.reused_tokens for output in outputs if output.reused_tokens)
    assert 0 < other.reused_tokens <= beside - 16  # up to the other picture, which looks the same as tokens


def test_a_conversation_goes_on_where_it_was(make, plain):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}]
    pipeline, params = make(), SamplingParams(max_tokens=12, ignore_eos=True)
    lengths = []
    for question in ("And then?", "Is that all?"):
        output = pipeline.generate([Request(messages, [picture(5)])], params)[0]
        messages = [*messages, {"role": "assistant", "content": output.text}, {"role": "user", "content": question}]
        lengths.append(output.prompt_tokens)
    last = pipeline.generate([Request(messages, [picture(5)])], params)[0]
    assert last.reused_tokens >= lengths[0]
    backend = pipeline.engines.manifest.backend
    assert answers([last]) == answers(plain[backend].generate([Request(messages, [picture(5)])], params))


def test_hidden_states_and_answers_do_not_disturb_each_other(make, plain):
    pipeline = make()
    requests = [related_request(seed) for seed in range(6)]
    params = SamplingParams(max_tokens=8)
    first = answers(pipeline.generate(requests, params))
    states = pipeline.hidden_states([related_request(seed) for seed in range(6, 12)])
    assert answers(pipeline.generate(requests, params)) == first
    backend = pipeline.engines.manifest.backend
    for found, expected in zip(states, plain[backend].hidden_states([related_request(s) for s in range(6, 12)])):
        assert relative_error(found, expected) < FP32_BEHIND_BOTH


def test_pipelines_on_the_same_engines_do_not_trust_each_others_cache(engines):
    """One at a time they may share engines; what one kept is not there any more when another has worked."""
    one, other = Pipeline(engines["torch"]), Pipeline(engines["torch"])
    requests, params = [related_request(seed) for seed in range(6)], SamplingParams(max_tokens=8)
    first = answers(one.generate(requests, params))
    other.generate([random_request(seed) for seed in range(6)], params)
    assert answers(one.generate(requests, params)) == first


# The embedding cache


def test_a_picture_that_comes_again_needs_no_engine(engines, monkeypatch):
    backend = engines["torch"]
    pipeline = Pipeline(backend)
    request, params = random_request(4, images=2, videos=1), SamplingParams(max_tokens=6)
    first = answers(pipeline.generate(request, params))
    monkeypatch.setattr(pipeline._media, "_runner", None)
    again = pipeline.generate(request, params)
    assert answers(again) == first
    assert again[0].timings.vision == 0
    with pytest.raises(ExecutionError, match="vision engine failed"):
        pipeline.generate(random_request(5, images=1), params)[0].text  # noqa: B018


def test_the_cache_keeps_to_its_limit(engines):
    pipeline = Pipeline(engines["torch"], PipelineOptions(embedding_cache_bytes=20_000))
    for seed in range(30):
        pipeline.generate(random_request(seed, images=2, videos=0), SamplingParams(max_tokens=1))
        assert pipeline.counters().embedding_bytes <= 20_000
    assert pipeline.counters().embedding_evictions > 0
    pipeline.clear_caches()
    assert pipeline.counters().embedding_bytes == 0


# Deadlines


@ONE_BACKEND
def test_deadlines_in_every_stage(make):
    clock = Clock()
    pipeline = make(clock=clock, max_num_tokens=8)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    running = [pipeline.submit(Request("What?", deadline=10), params) for _ in range(3)]
    patient = pipeline.submit(Request("What?", deadline=1000), params)
    while not all(output.token_ids for output in (*running, patient)):
        pipeline.step()
    waiting = pipeline.submit(Request("Why?", deadline=5), params)
    ahead = pipeline.submit(Request("How?", [picture(1)], deadline=5), params)
    pipeline.step()
    clock.now = 6
    pipeline.step()
    for output in (waiting, ahead):
        with pytest.raises(DeadlineError, match="the deadline of 5 s passed before its turn came, 6 s after"):
            output.text  # noqa: B018
    clock.now = 11
    before = [len(output.token_ids) for output in running]
    pipeline.step()
    for output, length in zip(running, before):
        assert output.finish_reason == "deadline"
        assert len(output.token_ids) == length + 1
    reading = pipeline.submit(Request("Word " * 40, deadline=1), params)
    pipeline.step()
    assert pipeline.counters().queued == 0
    clock.now = 13
    pipeline.step()
    with pytest.raises(DeadlineError, match="while the prompt was read, 2 s after submission"):
        reading.text  # noqa: B018
    assert patient.finish_reason is None
    drain(pipeline)
    assert patient.finish_reason == "length"
    found = pipeline.counters()
    assert (found.expired, found.finished, found.failed) == (6, 1, 0)


@ONE_BACKEND
def test_an_answer_cut_by_its_deadline_streams_what_it_has(make):
    pipeline = make(clock=Clock(tick=0.01))
    request = replace(random_request(4, images=1), deadline=1.0)
    events = list(pipeline.stream(request, SamplingParams(max_tokens=300, ignore_eos=True)))
    output = events[-1].output
    assert output.finish_reason == "deadline"
    assert 0 < len(events) < 300
    assert "".join(event.text for event in events) == output.text
    assert output.timings.total >= 1.0


@pytest.mark.parametrize("deadline", [0, -1, math.nan, math.inf, "soon", True])
def test_a_deadline_is_a_number_of_seconds(deadline):
    with pytest.raises(DeadlineError, match="it must be a number of seconds above 0, or None"):
        Request("What?", deadline=deadline)


# Cancellation, admission, failures


@ONE_BACKEND
def test_cancelling_in_every_stage(make):
    pipeline = make(max_num_tokens=8)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    answering = pipeline.submit(Request("What?"), params)
    while len(answering.token_ids) < 3:
        pipeline.step()
    reading = pipeline.submit(Request("Word " * 40), params)
    others = [pipeline.submit(Request("Why?"), params) for _ in range(2)]
    pipeline.step()
    prepared = pipeline.submit(random_request(1, images=1), params)
    queued = [pipeline.submit(Request("How?"), params) for _ in range(12)]
    pipeline.step()
    for output in (queued[-1], prepared, reading, answering):
        pipeline.cancel(output)
        pipeline.cancel(output)  # twice does no harm
        assert output.finish_reason == "cancelled"
    assert len(answering.token_ids) >= 3
    assert reading.token_ids == prepared.token_ids == queued[-1].token_ids == []
    assert pipeline.counters().cancelled == 4
    drain(pipeline)
    assert all(len(output.token_ids) == 50 for output in (*others, *queued[:-1]))
    assert pipeline.counters().cancelled == 4


@ONE_BACKEND
def test_what_never_fits_is_refused_while_all_slots_are_taken(make):
    pipeline = make()
    long = [pipeline.submit(Request("What?"), SamplingParams(max_tokens=100, ignore_eos=True)) for _ in range(4)]
    pipeline.step()
    at_once = pipeline.submit(Request("What?"), SamplingParams(max_tokens=PROFILE.max_seq_len))
    with pytest.raises(LimitError, match=r"max_tokens 700 leaves no room for a prompt in 700 \(--max-seq-len\)"):
        at_once.text  # noqa: B018
    soon = [
        pipeline.submit(Request("What?"), SamplingParams(max_tokens=PROFILE.max_seq_len - 5)),
        pipeline.submit(Request("What?", ["none.png"]), SamplingParams()),
    ]
    while not all(output.finished for output in soon):
        pipeline.step()
        assert not any(output.finished for output in long)
    with pytest.raises(LimitError, match="Lower max_tokens"):
        soon[0].text  # noqa: B018
    with pytest.raises(MediaError, match="no such file"):
        soon[1].text  # noqa: B018
    drain(pipeline)


def broken_by(marker, runner):
    """A vision engine that fails on any batch with an image of that many windows."""

    def run(pixel_values, layout):
        if marker in layout.sequence_lengths.tolist():
            raise RuntimeError("engine\nbroke")
        return runner(pixel_values, layout)

    return run


@ONE_BACKEND
def test_a_vision_engine_that_fails_on_one_image_leaves_the_others_alone(make, monkeypatch):
    pipeline = make()
    requests = [Request("What?", [picture(number, 56, 84)]) for number in range(4)]
    params = SamplingParams(max_tokens=5)
    expected = answers(pipeline.generate(requests, params))
    pipeline.clear_caches()
    wrong = Request("What?", [picture(9, 112, 112)])
    monkeypatch.setattr(pipeline._media, "_runner", broken_by(64, pipeline._media._runner))
    outputs = pipeline.generate([*requests[:2], wrong, *requests[2:]], params)
    assert answers(outputs[:2] + outputs[3:]) == expected
    with pytest.raises(ExecutionError, match="the vision engine failed: RuntimeError: engine broke"):
        outputs[2].text  # noqa: B018
    assert pipeline.counters().failed == 1


def test_a_decoder_that_fails_for_one_answer_leaves_the_others_alone(make, monkeypatch):
    pipeline = make()
    requests, params = [random_request(seed) for seed in range(6)], SamplingParams(max_tokens=10, ignore_eos=True)
    expected = answers(pipeline.generate(requests, params))
    decoder, original = pipeline.engines.decoder, pipeline.engines.decoder.step
    victim = []

    def step(chunks, *rest, **options):
        found = next((s for s in pipeline._executor()._cache.occupied if s.output is victim[0]), None)
        if found is not None and not found.unread and found.slot in [chunk.slot for chunk in chunks]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(chunks, *rest, **options)

    monkeypatch.setattr(decoder, "step", step)
    outputs = [pipeline.submit(request, params) for request in requests]
    victim.append(outputs[2])
    drain(pipeline)
    assert answers(outputs[:2] + outputs[3:]) == expected[:2] + expected[3:]
    with pytest.raises(ExecutionError, match=r"decoder engine failed: OutOfMemoryError: CUDA out of memory"):
        outputs[2].text  # noqa: B018


def test_numbers_that_overflow_end_their_answer_and_leave_nothing_in_its_slot(make, monkeypatch):
    pipeline = make(reuse_prefixes=False)
    requests, params = [random_request(seed) for seed in range(6)], SamplingParams(max_tokens=10, ignore_eos=True)
    expected = answers(pipeline.generate(requests, params))
    original = pipeline.engines.decoder.step

    def step(chunks, inputs_embeds, *rest, **options):
        return original(chunks, inputs_embeds * math.nan, *rest, **options)

    with monkeypatch.context() as broken:
        broken.setattr(pipeline.engines.decoder, "step", step)
        for output in pipeline.generate([random_request(seed) for seed in range(30, 42)], params):
            with pytest.raises(ExecutionError, match="no finite numbers"):
                output.text  # noqa: B018
    assert answers(pipeline.generate(requests, params)) == expected


def test_impossible_options_are_refused(engines):
    for options, message in (
        ({"max_num_tokens": 0}, "at least 1 token"),
        ({"embedding_cache_bytes": -1}, "0 keeps"),
        ({"video_pixel_limit": 0}, "video_pixel_limit is 0; a video has at least 1 pixel"),
        ({"video_decode_seconds": 0.0}, "video_decode_seconds is 0; decoding takes more than 0 s"),
        ({"video_decode_seconds": math.nan}, "video_decode_seconds is nan"),
    ):
        with pytest.raises(LimitError, match=message):
            Pipeline(engines["torch"], PipelineOptions(**options))


def test_limits_of_videos_are_those_of_the_options(engines):
    options = PipelineOptions(video_pixel_limit=5, video_decode_seconds=7.0)
    for each, limits in ((options, VideoLimits(5, 7.0)), (PipelineOptions(), VideoLimits())):
        assert Pipeline(engines["torch"], each)._media.preprocessor.video_limits == limits


# Counters


@ONE_BACKEND
def test_counters_follow_the_requests(make):
    pipeline = make()
    assert pipeline.counters().submitted == 0
    requests, params = [related_request(seed) for seed in range(9)], SamplingParams(max_tokens=7)
    outputs = [pipeline.submit(request, params) for request in requests]
    found = pipeline.counters()
    assert (found.submitted, found.queued, found.running) == (9, 9, 0)
    pipeline.step()
    pipeline.step()
    found = pipeline.counters()
    assert 0 < found.running <= 4
    assert found.queued + found.running + found.finished == 9
    assert 0 < found.kv_cache_usage <= 1
    drain(pipeline)
    found = pipeline.counters()
    assert (found.finished, found.queued, found.running, found.started) == (9, 0, 0, 9)
    timings = [output.timings for output in outputs]
    assert found.generated_tokens == sum(len(output.token_ids) for output in outputs)
    assert found.prompt_tokens_computed + found.prompt_tokens_reused == sum(output.prompt_tokens for output in outputs)
    assert found.mean_queue_seconds == pytest.approx(sum(t.queue for t in timings) / 9)
    assert found.mean_time_to_first_token_seconds == pytest.approx(sum(t.time_to_first_token for t in timings) / 9)
    assert found.tokens_per_second == pytest.approx(found.generated_tokens / found.step_seconds)
    assert found.kv_cache_bytes == pipeline.engines.decoder.cache.nbytes
    assert found.kept_prefix_tokens > 0
    assert found.kv_cache_usage == 0
    assert timings[-1].queue > timings[0].queue
    for t in timings:
        assert t.queue + t.preprocess + t.vision + t.prefill + t.decode <= t.total + 1e-9
    assert asdict(found)  # plain numbers, for a log


# The soak


def soak_requests(plain):
    """Requests, and the answer that each gets alone."""
    kinds = []
    for number in range(60):
        request = related_request(number) if number % 3 else random_request(number, words=8)
        kinds.append((request, random_params(number, 1 + number % 7)))
    return kinds, answers(plain.generate([request], params)[0] for request, params in kinds)


def soak(pipeline, expected, count, seed):
    """Random requests come, are cancelled, and run out of time; returns how each ended."""
    rng = np.random.default_rng(seed)
    clock = pipeline._clock
    kinds, alone = expected
    live, done, ends = [], 0, Counter()
    while done < count or live:
        if done < count and len(live) < 24 and rng.random() < 0.9:
            kind = int(rng.integers(len(kinds)))
            deadline = float(rng.integers(1, 12)) if rng.random() < 0.25 else None
            request, params = kinds[kind]
            live.append((pipeline.submit(replace(request, deadline=deadline), params), kind))
            done += 1
        if live and rng.random() < 0.03:
            pipeline.cancel(live[int(rng.integers(len(live)))][0])
        pipeline.step()
        clock.now += 1
        for output, kind in [item for item in live if item[0].finished]:
            tokens, text, reason = alone[kind]
            if isinstance(output.error, DeadlineError):
                ends["late"] += 1
                continue
            assert output.error is None
            ends[output.finish_reason] += 1
            if output.finish_reason in ("cancelled", "deadline"):
                assert output.token_ids == tokens[: len(output.token_ids)]
                assert text.startswith(output.text) or output.finish_reason == "deadline"
            else:
                assert (output.token_ids, output.text, output.finish_reason) == (tokens, text, reason)
        live = [item for item in live if not item[0].finished]
    assert not pipeline.busy
    return ends


def check_soak(pipeline, ends, count):
    found = pipeline.counters()
    assert sum(ends.values()) == count == found.submitted
    assert found.finished == ends["stop"] + ends["length"]
    assert found.cancelled == ends["cancelled"]
    assert found.expired == ends["deadline"] + ends["late"]
    assert (found.failed, found.queued, found.running) == (0, 0, 0)
    assert min(ends["cancelled"], ends["deadline"], ends["late"]) > 0
    assert found.prompt_tokens_reused > found.prompt_tokens_computed / 4
    assert found.embedding_hits > found.embedding_misses
    pipeline.clear_caches()
    found = pipeline.counters()
    assert (found.embedding_bytes, found.kept_prefix_tokens) == (0, 0)
    assert pipeline.engines.decoder.cache.capacity == 128


@pytest.fixture(scope="module")
def small_engines(tmp_path_factory):
    """By backend, engines of one decoder layer and two vision blocks: the scheduler is what is tried here."""
    folder = tmp_path_factory.mktemp("small")
    config = config_dict(write_processor_files(folder / "model"))
    config |= {"num_hidden_layers": 1, "max_window_layers": 1}
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    save_model(random_model(Qwen2_5_VLConfig(**config)), folder / "model", torch.float32, "published")
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return {backend: open_engines(build(folder / "model", folder / backend, backend), "cpu") for backend in BACKENDS}


def unshared(engines):
    return Pipeline(engines, PipelineOptions(reuse_prefixes=False, embedding_cache_bytes=0))


def test_many_requests_leave_nothing_behind(small_engines):
    """What Python and the process hold after them is what they held after the first 300."""
    engines, process = small_engines["torch"], psutil.Process()
    expected = soak_requests(unshared(engines))
    pipeline = Pipeline(engines, PipelineOptions(max_num_tokens=64), clock=Clock())
    ends = soak(pipeline, expected, 300, seed=1)
    pipeline.clear_caches()
    gc.collect()
    resident = process.memory_info().rss
    more = often(300, 1600)
    ends += soak(pipeline, expected, more, seed=2)
    pipeline.clear_caches()
    gc.collect()
    assert process.memory_info().rss - resident < 48 << 20
    tracemalloc.start(1)
    try:
        ends += soak(pipeline, expected, 100, seed=3)
        pipeline.clear_caches()
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert traced < 1 << 18
    check_soak(pipeline, ends, 400 + more)


def test_soak_on_onnxruntime(small_engines):
    """A cache that is too small for all pictures, too."""
    expected = soak_requests(unshared(small_engines["onnxruntime"]))
    pipeline = Pipeline(
        small_engines["onnxruntime"], PipelineOptions(max_num_tokens=64, embedding_cache_bytes=100_000), clock=Clock()
    )
    count = often(200, 400)
    check_soak(pipeline, soak(pipeline, expected, count, seed=4), count)
    assert pipeline.counters().embedding_evictions > 0


def test_soak_of_the_tiny_model(tmp_path):
    try:
        checkpoint = resolve_model("tiny").folder
    except CheckpointError:
        pytest.skip("the tiny model is not there yet")
    engines = open_engines(build(checkpoint, tmp_path / "tiny", "torch"), "cpu")
    pipeline = Pipeline(engines, PipelineOptions(max_num_tokens=32), clock=Clock())
    check_soak(pipeline, soak(pipeline, soak_requests(unshared(engines)), 200, seed=5), 200)
