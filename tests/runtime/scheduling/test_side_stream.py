"""Order and memory of work beside the caller's stream, as fake streams see it; the real ones are run in tests/gpu."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.scheduling.side_stream import ReadyEvent, SideStream
from tests.support.fake_decoder import FakeDecoder, drain, expected, sequence
from tests.support.requests import answers, random_request

CPU = torch.device("cpu")


class FakeCuda:
    """Streams and events that note in which order things are asked of them; an event is over when a test says so."""

    def __init__(self, monkeypatch):
        self.log, self.events, self.kept = [], [], []
        self.main, self.side = self.stream("main"), self.stream("side")
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "stream", self.switch)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.kept.append((tensor, stream)))

    def stream(self, name):
        def record():
            self.log.append(f"{name} records")
            event = SimpleNamespace(over=False, query=lambda: event.over)
            self.events.append(event)
            return event

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.log.append(f"{name} waits for event {self.events.index(event)}"),
            record_event=record,
        )

    @contextlib.contextmanager
    def switch(self, stream):
        before, self.current = self.current, stream
        self.log.append(f"on {stream.name}")
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_work_follows_the_caller_and_the_taker_follows_the_work(cuda):
    side = SideStream(CPU, cuda.side)
    with side.work() as ready:
        made = torch.ones(3)
        cuda.log.append("work")
    assert cuda.log == ["side waits for main", "on side", "work", "side records"]
    assert not ready.passed
    ready.wait(made)
    assert cuda.log[-1] == "main waits for event 0"
    assert [(tensor is made, stream.name) for tensor, stream in cuda.kept] == [(True, "main")]
    cuda.events[0].over = True
    assert ready.passed


def test_what_work_reads_is_kept_until_it_is_over(cuda):
    side = SideStream(CPU, cuda.side)
    for number in range(3):
        with side.work(number):
            pass
    assert [reads for _, reads in side._reading] == [0, 1, 2]
    cuda.events[0].over = cuda.events[2].over = True  # in the order of the stream: the second keeps the third
    with side.work(3):
        pass
    assert [reads for _, reads in side._reading] == [1, 2, 3]


def test_work_that_fails_is_waited_for_all_the_same(cuda):
    side = SideStream(CPU, cuda.side)
    with pytest.raises(RuntimeError), side.work("pixels") as ready:
        raise RuntimeError("engine broke")
    assert [reads for _, reads in side._reading] == ["pixels"]
    assert not ready.passed


def test_without_a_stream_all_is_there_at_once():
    with SideStream.beside(CPU).work() as ready:
        made = torch.ones(3)
    assert ready.passed
    ready.wait(made)


def arriving(number, cuda, prompt, max_tokens):
    with SideStream(CPU, cuda.side).work() as ready:
        item = sequence(prompt, max_tokens)
    item.ready = ready
    assert len(cuda.events) == number + 1
    return item


def scheduler_over(decoder):
    from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler

    return Scheduler(decoder, 8)


def test_answers_go_on_while_a_prompt_is_embedded(cuda):
    decoder = FakeDecoder(4)
    scheduler = scheduler_over(decoder)
    answering, late = sequence([1, 2, 3], 12), arriving(0, cuda, [4, 5, 6, 7], 3)
    scheduler.add(answering)
    scheduler.add(late)
    cuda.log.clear()
    for _ in range(5):
        scheduler.step()
    assert len(answering.stream.token_ids) == 5  # one a step
    assert late.slot is None
    assert cuda.log == []  # no stream waits for the vision engine
    cuda.events[0].over = True
    drain(scheduler)
    assert cuda.log == ["main waits for event 0"]
    assert answering.output.token_ids == expected([1, 2, 3], 12)
    assert late.output.token_ids == expected([4, 5, 6, 7], 3)
    assert len(cuda.kept) == 1


def test_where_nothing_else_is_to_do_the_stream_waits_and_not_the_host(cuda):
    decoder = FakeDecoder(4)
    scheduler = scheduler_over(decoder)
    decoder.fails = lambda call: cuda.log.append("decoder")  # notes the call
    alone = arriving(0, cuda, [4, 5, 6], 2)
    scheduler.add(alone)
    cuda.log.clear()
    drain(scheduler)  # the event is never over for the host
    assert cuda.log[:2] == ["main waits for event 0", "decoder"]
    assert alone.output.token_ids == expected([4, 5, 6], 2)


def test_a_pipelines_prompts_read_embeddings_after_they_are_made(cuda, engine_dirs, monkeypatch):
    engines = open_engines(engine_dirs["torch"], "cpu")
    requests, params = [random_request(seed, images=1, videos=0) for seed in range(5)], SamplingParams(max_tokens=4)
    plain = answers(Pipeline(engines, PipelineOptions(overlap=False)).generate(requests, params))
    pipeline = Pipeline(engines)
    pipeline._side = SideStream(CPU, cuda.side)
    runner, step = pipeline._media._runner, engines.decoder.step

    def vision(*args):
        cuda.log.append(f"vision on {cuda.current.name}")
        return runner(*args)

    def decode(*args, **options):
        cuda.log.append(f"decoder on {cuda.current.name}")
        return step(*args, **options)

    monkeypatch.setattr(pipeline._media, "_runner", vision)
    monkeypatch.setattr(engines.decoder, "step", decode)
    found = []
    outputs = [pipeline.submit(request, params) for request in requests]
    while pipeline.busy:
        pipeline.step()
        for event in cuda.events:  # over one step after it was queued
            event.over = True
    found = answers(outputs)
    assert found == plain
    pipeline.close()
    assert {line for line in cuda.log if line.startswith("vision")} == {"vision on side"}
    assert {line for line in cuda.log if line.startswith("decoder")} == {"decoder on main"}
    waits = [line for line in cuda.log if line.startswith("main waits for event")]
    assert len(waits) == 5  # each prompt's
    for line in waits:
        number = int(line.split()[-1])
        recorded = [place for place, entry in enumerate(cuda.log) if entry == "side records"][number]
        assert recorded < cuda.log.index(line)
    assert len(cuda.kept) == 5


def test_features_and_hidden_states_wait_for_their_stream(cuda, engine_dirs):
    pipeline = Pipeline(open_engines(engine_dirs["torch"], "cpu"))
    pipeline._side = SideStream(CPU, cuda.side)
    image = random_request(3, images=1).images[0]
    pipeline.embed_images([image])
    assert cuda.log[-2:] == ["side records", "main waits for event 0"]
    pipeline.hidden_states([Request("What?", [image])])
    assert cuda.log[-2:] == ["side records", "main waits for event 1"]


def test_an_arrival_of_nothing_is_there():
    assert ReadyEvent().passed
