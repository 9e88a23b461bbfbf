"""Media loaded on threads while others are answered: equal answers, order, errors, cancellation, deadlines, threads."""

import gc
import io
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams, Video
from qwen2vl_trt.errors import DeadlineError, LimitError, MediaError
from qwen2vl_trt.messages import Media
from qwen2vl_trt.runtime import pipeline as pipeline_module
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.inputs import images as images_module
from qwen2vl_trt.runtime.inputs import video as video_module
from qwen2vl_trt.runtime.scheduling.preparation import loading_bytes, on_gpu
from tests.support.requests import PATIENCE, Gate, answers, held, picture, random_params, random_request
from tests.support.thorough import often

THREADS = pipeline_module._LOAD_THREADS


@pytest.fixture(scope="module")
def engines(engine_dirs):
    return open_engines(engine_dirs["torch"], "cpu")


@pytest.fixture
def gated(engines):
    """A pipeline whose requests of :func:`held` wait for the gate."""
    pipeline = Pipeline(engines)
    gate = Gate(pipeline, 99)
    yield pipeline, gate
    gate.opened.set()
    pipeline.close()


def step_until(pipeline, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        pipeline.step()
        assert time.monotonic() < end


def loading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("load-media")]


@settings(
    max_examples=often(3, 8),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seeds=st.lists(st.integers(0, 10_000), min_size=4, max_size=14), data=st.data())
def test_answers_are_those_of_the_serial_order(engines, seeds, data):
    requests, params = [random_request(seed) for seed in seeds], [random_params(seed) for seed in seeds]
    delays = data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.002, 0.02]), min_size=14, max_size=14))
    expected = answers(Pipeline(engines, PipelineOptions(overlap=False)).generate(requests, params))
    pipeline = Pipeline(engines)
    load = pipeline._preparer.load
    following = iter(delays * len(seeds))

    def slow(*arguments):
        time.sleep(next(following))
        return load(*arguments)

    pipeline._preparer.load = slow
    for _ in range(2):  # the second time embeddings and prefixes are there
        assert answers(pipeline.generate(requests, params)) == expected
    assert pipeline.counters().embedding_hits > 0 or not any(r.images or r.videos for r in requests)
    pipeline.close()


def test_answers_under_way_do_not_wait_for_a_picture(gated):
    pipeline, gate = gated
    running = pipeline.submit(Request("Who are you?"), SamplingParams(max_tokens=40, ignore_eos=True))
    step_until(pipeline, lambda: running.token_ids)
    late = pipeline.submit(held(), SamplingParams(max_tokens=3))
    step_until(pipeline, lambda: running.finished)  # would fail in the gate
    assert gate.begun == 1
    assert not late.token_ids
    assert threading.current_thread() not in gate.threads
    gate.opened.set()
    step_until(pipeline, lambda: late.finished)
    assert late.token_ids
    assert late.timings.preprocess > 0


def test_the_loaded_pass_those_still_loading_and_are_passed_by_nobody_later(gated):
    """All slots are taken while the first is held up; once it is there the next free slot is its."""
    pipeline, gate = gated
    slots = pipeline.engines.decoder.slots
    first = pipeline.submit(held(), SamplingParams(max_tokens=2))
    ready = [pipeline.submit(random_request(seed, images=1), SamplingParams(max_tokens=9 + seed)) for seed in range(9)]
    step_until(pipeline, lambda: sum(bool(output.token_ids) for output in ready) == slots)
    waiting = [pending.output for pending in pipeline._queue]
    assert waiting[0] is first
    assert not first.finished
    gate.opened.set()
    next(iter(pipeline._queue)).job.future.result(PATIENCE)
    while True:
        assert [pending.output for pending in pipeline._queue] == waiting  # nobody else has gone in before it
        pipeline.step()
        if len(pipeline._queue) < len(waiting):
            assert first not in [pending.output for pending in pipeline._queue]
            break
    step_until(pipeline, lambda: not pipeline.busy)
    assert all(output.finish_reason is not None for output in (first, *ready))


def test_an_idle_pipeline_waits_in_one_step(gated):
    pipeline, gate = gated
    output = pipeline.submit(held(), SamplingParams(max_tokens=2))
    threading.Timer(0.2, gate.opened.set).start()
    pipeline.step()
    assert output.token_ids
    assert pipeline.counters().steps == 1


def test_loading_that_is_over_at_once_counts_once(engines):
    pipeline = Pipeline(engines)
    submit, load = pipeline._prefetcher.submit, pipeline._preparer.load

    def submit_and_wait(*arguments):
        job = submit(*arguments)
        job.future.result(PATIENCE)
        return job

    def slow(*arguments):
        time.sleep(0.2)
        return load(*arguments)

    pipeline._prefetcher.submit, pipeline._preparer.load = submit_and_wait, slow
    timings = pipeline.generate(held(), SamplingParams(max_tokens=1))[0].timings
    assert timings.preprocess >= 0.2
    assert timings.preprocess + timings.vision + timings.prefill <= timings.total


def test_a_fault_ends_its_own_request(gated):
    pipeline, gate = gated
    gate.opened.set()
    requests = [
        Request("What?", ["none.png"]),
        random_request(3, images=1),
        Request("What?", [b"no picture"]),
        Request("What?", "letters"),
        Request([{"role": "user", "content": [{"type": "image"}]}], []),
    ]
    outputs = pipeline.generate(requests, SamplingParams(max_tokens=3))
    assert [type(output.error).__name__ for output in outputs] == [
        "MediaError",
        "NoneType",
        "MediaError",
        "MediaError",
        "PromptError",
    ]
    serial = Pipeline(pipeline.engines, PipelineOptions(overlap=False)).generate(requests, SamplingParams(max_tokens=3))
    assert [str(output.error) for output in outputs] == [str(output.error) for output in serial]
    with pytest.raises(MediaError, match=r"image 1.*none\.png.*no such file"):
        outputs[0].text  # noqa: B018


def test_cancelled_while_loading(gated):
    pipeline, gate = gated
    outputs = [pipeline.submit(held(), SamplingParams(max_tokens=2)) for _ in range(THREADS + 2)]
    pipeline._take_in()
    time.sleep(0.05)  # as many as there are threads begin
    for output in outputs:
        pipeline.cancel(output)
    assert not pipeline.busy
    gate.opened.set()
    pipeline.close()
    assert gate.begun <= THREADS  # those in the queue were never begun with
    assert [output.finish_reason for output in outputs] == ["cancelled"] * len(outputs)


def test_a_deadline_passes_while_loading(gated):
    pipeline, _ = gated
    output = pipeline.submit(held(deadline=0.05))
    step_until(pipeline, lambda: output.finished)  # the gate is shut
    assert isinstance(output.error, DeadlineError)
    assert not pipeline.busy


def test_a_clock_that_stands_still(engines):
    pipeline = Pipeline(engines, clock=lambda: 0.0)
    gate = Gate(pipeline, 99)
    output = pipeline.submit(held(deadline=3600))
    threading.Timer(0.05, gate.opened.set).start()
    step_until(pipeline, lambda: output.finished)
    assert output.finish_reason is not None
    assert output.timings.total == 0
    pipeline.close()


def test_close_leaves_no_thread_and_the_pipeline_goes_on(gated):
    pipeline, gate = gated
    before = len(loading_threads())
    waiting = pipeline.submit(held(), SamplingParams(max_tokens=2))
    pipeline._take_in()
    assert len(loading_threads()) > before
    threading.Timer(0.05, gate.opened.set).start()
    pipeline.close()
    assert len(loading_threads()) == before
    assert waiting.finish_reason == "cancelled"
    assert pipeline.generate(held(), SamplingParams(max_tokens=2))[0].token_ids
    pipeline.close()
    pipeline.close()
    assert len(loading_threads()) == before


def test_a_pipeline_that_is_let_go_ends_its_threads(engines):
    gc.collect()
    pipeline = Pipeline(engines)
    pipeline.generate(random_request(1, images=2), SamplingParams(max_tokens=1))
    threads = list(pipeline._prefetcher._executor._threads)
    assert threads
    del pipeline
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_no_thread_without_overlap(engines):
    pipeline = Pipeline(engines, PipelineOptions(overlap=False))
    pipeline.generate(random_request(1, images=2), SamplingParams(max_tokens=1))
    assert pipeline._prefetcher._executor is None


def test_what_lies_on_a_gpu():
    image, there = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta")
    for media in ([Video([there], 2.0)], [[there, there]], [there[None]], [image, there]):
        assert on_gpu(media)
    for media in ([], [image], ["a.png"], [b"..."], [np.zeros((4, 4, 3), np.uint8)], [Video([image], 2.0)]):
        assert not on_gpu(media)


def test_one_opened_image_in_many_requests(engines, tmp_path):
    """Pillow reads an open file when its pixels are wanted: two threads that both want them would read it at once."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 500, 3), dtype=np.uint8)).save(path)
    pipeline, params = Pipeline(engines, PipelineOptions(max_pixels=35280)), SamplingParams(max_tokens=2)
    for _ in range(5):
        image = Image.open(path)
        outputs = pipeline.generate([Request("What?", [image])] * 8, params)
        assert len({output.text for output in outputs}) == 1
    pipeline.close()


class Alive:
    """Bytes of decoded pixels that a pipeline has somewhere, now and at most."""

    def __init__(self, pipeline):
        self.now = self.peak = 0
        self._lock = threading.Lock()
        self._load, pipeline._preparer.load = pipeline._preparer.load, self.load

    def load(self, *arguments):
        media = self._load(*arguments)
        for image in media:
            self.count(image.nbytes)
            weakref.finalize(image, self.count, -image.nbytes)
        return media

    def count(self, nbytes):
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)


def png(seed, height, width):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(buffer, "PNG")
    return buffer.getvalue()


SIZE = 3 * 60 * 80


@pytest.mark.parametrize(("overlap", "images"), [(True, 4.5), (False, 0)])
def test_what_waits_is_bounded_in_bytes(engines, overlap, images):
    """Bounded by the number of requests alone, twice as many as there are slots would be decoded."""
    pipeline = Pipeline(
        engines, PipelineOptions(overlap=overlap, ahead_bytes=int(images * SIZE), embedding_cache_bytes=0)
    )
    alive = Alive(pipeline)
    most = max(images, THREADS if overlap else 1) * SIZE  # one a thread until a size is known; at least one
    assert 3 * engines.decoder.slots * SIZE > 2 * most
    requests = [Request("What?", [png(seed, 60, 80)]) for seed in range(3 * engines.decoder.slots)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    outputs = pipeline.generate(requests, params)
    assert all(output.finish_reason == "length" for output in outputs)
    assert SIZE <= alive.peak <= most
    expected = Pipeline(engines).generate(requests, params)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    pipeline.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_what_fails_after_it_was_loaded_keeps_nobody_waiting(engines, overlap):
    """Where there is room for one request's media alone, the next gets it when the first turns out not to fit."""
    pipeline = Pipeline(engines, PipelineOptions(overlap=overlap, ahead_bytes=0, embedding_cache_bytes=0))
    outputs = [
        pipeline.submit(Request("What?", [png(seed, 60, 80)]), SamplingParams(max_tokens=most))
        for seed, most in enumerate((699, 699, 2))
    ]
    ends_in(20, lambda: step_until(pipeline, lambda: all(output.finished for output in outputs)))
    assert [type(output.error) for output in outputs] == [LimitError, LimitError, type(None)]
    pipeline.close()


def ends_in(seconds, work):
    """A thread of its own: a hang is a failure, not the end of the run."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def test_pixels_are_let_go_of_once_they_are_embedded(engines):
    pipeline = Pipeline(engines, PipelineOptions(embedding_cache_bytes=0))
    alive = Alive(pipeline)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    outputs = [pipeline.submit(Request("What?", [png(seed, 60, 80)]), params) for seed in range(2)]
    step_until(pipeline, lambda: all(output.token_ids for output in outputs))
    assert not any(output.finished for output in outputs)
    assert alive.peak > 0
    assert alive.now == 0
    pipeline.close()


def test_frames_are_read_where_they_come_in_and_not_again(engines, monkeypatch):
    """Whether they are within 0..1 is known from then on, and so are their bytes: neither a step nor packing looks."""
    reads, counted = [], images_module.rgb
    for module in (images_module, video_module):
        monkeypatch.setattr(module, "rgb", lambda *args, **kw: reads.append(1) or counted(*args, **kw))
    pipeline = Pipeline(engines, PipelineOptions(embedding_cache_bytes=0))
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    busy = [pipeline.submit(Request(f"Who {n}?"), params) for n in range(engines.decoder.slots)]
    step_until(pipeline, lambda: all(output.token_ids for output in busy))
    frames = [torch.rand(3, 56, 84) for _ in range(4)]
    waiting = pipeline.submit(Request("What?", [torch.rand(3, 56, 84)], [Video(frames, 2.0)]), params)
    step_until(pipeline, lambda: waiting.prompt_tokens)
    assert len(reads) == 5
    assert not any(output.finished for output in busy)
    step_until(pipeline, lambda: waiting.finished)
    assert waiting.error is None
    assert len(reads) == 5
    pipeline.close()


def test_bytes_of_frames_in_memory():
    frame = picture(1, 60, 80)
    for videos, nbytes in (
        ([[frame, frame]], 2 * SIZE),
        ([np.stack([frame, frame])], 2 * SIZE),
        ([Video([frame], 2.0)], SIZE),
        (["a.mp4"], None),
        ([b"..."], None),
        ([5], 0),
    ):
        assert loading_bytes(Media([frame], videos)) == (None if nbytes is None else SIZE + nbytes)


def test_a_file_is_counted_as_its_header_says(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (80, 60)).save(path)
    assert loading_bytes(Media([str(path)])) == 7 * 60 * 80 + path.stat().st_size


def test_a_negative_number_of_bytes():
    with pytest.raises(LimitError, match="ahead_bytes is -1"):
        Pipeline(None, PipelineOptions(ahead_bytes=-1))
