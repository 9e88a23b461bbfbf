"""A pipeline among threads, and in a process that was forked from its maker's."""

import os
import threading
import warnings

import pytest

from qwen2vl_trt import Pipeline, SamplingParams
from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.exclusive import Exclusive
from tests.runtime.test_pipeline import answers, random_params, random_request

PATIENCE = 60  # seconds after which a test that hangs fails


@pytest.fixture(scope="module")
def engines(engine_dirs):
    return open_engines(engine_dirs["torch"], "cpu")


def test_others_wait_and_the_thread_that_is_in_comes_in_again():
    alone, order = Exclusive(), []

    def enter():
        with alone:
            order.append("other")

    with alone:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join(0.05)
        with alone:
            order.append("first")
    thread.join(PATIENCE)
    assert order == ["first", "other"]


def test_threads_that_answer_with_one_pipeline_get_their_own_tokens(engines):
    requests, params = [random_request(seed) for seed in range(12)], [random_params(seed, 8) for seed in range(12)]
    expected = answers(Pipeline(engines).generate(requests, params))
    pipeline, found, events = Pipeline(engines), {}, {number: [] for number in range(4)}

    def answer(number):
        own = slice(3 * number, 3 * number + 3)
        found[number] = pipeline.generate(requests[own], params[own], events[number].append)

    threads = [threading.Thread(target=answer, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers([output for number in range(4) for output in found[number]]) == expected
    for number, outputs in found.items():
        for index, output in enumerate(outputs):
            assert [event.token_id for event in events[number] if event.index == index] == output.token_ids
    counted = pipeline.counters()
    assert (counted.submitted, counted.finished) == (12, 12)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_is_told_instead_of_waiting_for_ever(engines):
    pipeline = Pipeline(engines)
    pipeline.generate([random_request(1, images=1)], SamplingParams(max_tokens=1))  # its threads run
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads, which is the point
        child = os.fork()
    if not child:
        try:
            for call in (lambda: pipeline.submit(random_request(1)), pipeline.step, lambda: pipeline.embed_images([])):
                try:
                    call()
                except ExecutionError as error:
                    os.write(write, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        lines = told.read().splitlines()
    os.waitpid(child, 0)
    assert len(lines) == 3
    assert f"belongs to process {os.getpid()}" in lines[0]
    assert pipeline.generate([random_request(1)], SamplingParams(max_tokens=1))[0].finished  # here it goes on
