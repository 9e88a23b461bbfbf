"""A pipeline on a thread of its own: threads beside asyncio tasks, hanging up, load, closing, failure."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qwen2vl_trt import Pipeline, Request, SamplingParams, Service
from qwen2vl_trt.errors import DeadlineError, ExecutionError, MediaError, SamplingError, UnavailableError
from qwen2vl_trt.runtime.backends.runners import open_engines
from tests.support.requests import Gate, answers, held, random_params, random_request

PATIENCE = 60  # seconds after which a test that hangs fails
LONG = SamplingParams(max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def engines(engine_dirs):
    return open_engines(engine_dirs["torch"], "cpu")


@pytest.fixture
def pipeline(engines):
    return Pipeline(engines)


@pytest.fixture
def service(pipeline):
    with Service(pipeline) as service:
        yield service


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def within_patience(work):
    async def limited():
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(limited())


def test_threads_and_tasks_get_what_generate_gives(service, engines):
    requests, params = [random_request(seed) for seed in range(24)], [random_params(seed, 8) for seed in range(24)]
    expected = answers(Pipeline(engines).generate(requests, params))
    outputs = [None] * len(requests)

    def in_a_thread(number):
        answer = service.submit(requests[number], params[number])
        events = list(answer)
        assert [event.token_id for event in events] == answer.output.token_ids
        assert [event.token_id for event in answer] == answer.output.token_ids  # from the first again
        outputs[number] = answer.result(PATIENCE)

    async def in_a_task(number):
        answer = service.submit(requests[number], params[number])
        events = [event async for event in answer]
        assert "".join(event.text for event in events) == answer.output.text
        outputs[number] = await answer

    async def tasks():
        await asyncio.gather(*(in_a_task(number) for number in range(12, 24)))

    threads = [threading.Thread(target=in_a_thread, args=[number]) for number in range(12)]
    for thread in threads:
        thread.start()
    within_patience(tasks())
    for thread in threads:
        thread.join(PATIENCE)
    assert answers(outputs) == expected
    counted = service.counters()
    assert (counted.submitted, counted.finished, counted.queued, counted.running) == (24, 24, 0, 0)


def test_tokens_come_while_the_answer_grows(service):
    answer = service.submit(random_request(1), LONG)
    for event in answer:
        if event.output.token_ids[1:]:
            break  # would be 100 if they came together
    assert 1 < len(answer.result(PATIENCE).token_ids) < 100


@pytest.mark.parametrize("streamed", [True, False])
def test_a_loop_is_woken_once_a_step_and_once_where_answers_are_awaited(service, streamed):
    tokens, woken = 40, []

    async def read(answer):
        return [event async for event in answer] if streamed else await answer

    async def main():
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: (woken.append(call), wake(*call))
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        submitted = [service.submit(Request("x"), params) for _ in range(3)]
        await asyncio.gather(*map(read, submitted))
        return submitted

    for answer in within_patience(main()):
        assert len(answer.token_times) == len(answer.output.token_ids) == tokens
        assert answer.token_times == sorted(answer.token_times)
    # The requests may begin a step or two apart.
    assert len(woken) <= (tokens + 10 if streamed else 3)


def leave_by_break(service):
    answer = service.submit(random_request(1), LONG)
    for _ in answer:
        break
    return answer


def leave_a_task_by_break(service):
    async def work():
        answer = service.submit(random_request(1), LONG)
        async for _ in answer:
            break
        return await answer and answer

    return within_patience(work())


def leave_as_cancelled_task(service):
    async def work():
        answer = service.submit(random_request(1), LONG)
        task = asyncio.create_task(read(answer))
        while not answer.output.token_ids:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer

    async def read(answer):
        return await answer

    return within_patience(work())


def leave_by_cancel(service):
    answer = service.submit(random_request(1), LONG)
    answer.cancel()
    return answer


@pytest.mark.parametrize("leave", [leave_by_break, leave_a_task_by_break, leave_as_cancelled_task, leave_by_cancel])
def test_who_hangs_up_cancels(service, leave):
    output = leave(service).result(PATIENCE)
    assert output.finish_reason == "cancelled"
    assert len(output.token_ids) < 100
    wait_until(lambda: service.counters().running == 0)
    assert service.counters().cancelled == 1


def test_a_picture_that_takes_long_holds_up_nobody(pipeline):
    gate = Gate(pipeline, 99)
    with Service(pipeline) as service:
        slow, left = service.submit(held(), SHORT), service.submit(held("Which?"), SHORT)
        wait_until(lambda: gate.begun)  # the thread has nothing else to do and waits for it
        assert service.submit(Request("Hello"), SHORT).result(PATIENCE).finished
        left.cancel()
        assert left.result(PATIENCE).finish_reason == "cancelled"
        assert not slow.output.finished, (slow.output.finish_reason, slow.output.error)
        with pytest.raises(TimeoutError, match="not ended"):
            slow.result(0.01)
        gate.opened.set()
        assert slow.result(PATIENCE).error is None


def test_who_is_wrong_is_told_while_another_picture_is_loaded(pipeline):
    gate = Gate(pipeline, 99)
    with Service(pipeline) as service:
        slow = service.submit(held(), SHORT)
        wait_until(lambda: gate.begun)
        try:
            assert service.submit(Request([-1])).result(PATIENCE).error is not None
        finally:
            gate.opened.set()
        assert slow.result(PATIENCE).error is None


def test_what_is_wrong_with_a_request_is_raised_where_it_is_read(service):
    bad = service.submit(Request("What?", [b"no image"]), SHORT)
    wrong = service.submit(Request("What?"), "no params")
    late = service.submit(Request("What?", deadline=1e-9), SHORT)
    good = service.submit(random_request(1), SHORT)
    with pytest.raises(MediaError):
        list(bad)
    with pytest.raises(SamplingError, match="params is of type str; give SamplingParams"):
        list(wrong)
    with pytest.raises(DeadlineError):
        list(late)

    async def read():
        assert isinstance((await bad).error, MediaError)
        return [event async for event in bad]

    with pytest.raises(MediaError):
        within_patience(read())
    assert good.result(PATIENCE).error is None


def test_submitting_and_counting_wait_for_no_step_and_a_deadline_counts_from_there(service, pipeline):
    with pipeline._alone:  # as a step has it
        answer = service.submit(Request("Hello", deadline=0.05), SHORT)
        assert service.counters().submitted == 1
        time.sleep(0.1)
    assert isinstance(answer.result(PATIENCE).error, DeadlineError)


def test_too_many_are_refused(pipeline):
    gate = Gate(pipeline, 99)
    with Service(pipeline, max_pending=2) as service:
        first = [service.submit(held(), SHORT) for _ in range(2)]
        with pytest.raises(UnavailableError, match=r"2 requests have not ended.*try again later"):
            service.submit(Request("Hello"), SHORT)
        gate.opened.set()
        assert all(answer.result(PATIENCE).error is None for answer in first)
        assert service.submit(Request("Hello"), SHORT).result(PATIENCE).error is None


@pytest.mark.parametrize("drain", [0.0, None])
def test_close_ends_every_answer_and_the_thread(pipeline, drain):
    service = Service(pipeline)
    requests = [service.submit(random_request(seed), LONG) for seed in range(12)]
    service.close(drain)
    outputs = [answer.result(0) for answer in requests]
    if drain is None:
        assert {output.finish_reason for output in outputs} == {"length"}
    else:
        assert "cancelled" in {output.finish_reason for output in outputs}
    assert not any(thread.name == "qwen2vl-service" for thread in threading.enumerate())
    assert not pipeline.busy
    with pytest.raises(UnavailableError, match="closed"):
        service.submit(Request("Hello"))
    service.close()  # once more is no harm


def test_a_pipeline_that_breaks_fails_what_is_there_and_what_comes(pipeline, monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pipeline, "step", broken)
    with Service(pipeline) as service:
        output = service.submit(Request("Hello")).result(PATIENCE)
        assert isinstance(output.error, ExecutionError)
        wait_until(lambda: not service._thread.is_alive())
        with pytest.raises(UnavailableError, match="has failed: the pipeline failed: ZeroDivisionError: a bug"):
            service.submit(Request("Hello"))


def test_a_loop_that_is_gone_harms_nobody(pipeline):
    gate = Gate(pipeline, 99)
    with Service(pipeline) as service:
        answer = service.submit(held(), SHORT)
        loop = asyncio.new_event_loop()
        task = loop.create_task(answer._later(0))
        loop.run_until_complete(asyncio.sleep(0.01))  # the task waits
        loop.close()
        gate.opened.set()
        assert answer.result(PATIENCE).error is None
        assert service.submit(Request("Hello"), SHORT).result(PATIENCE).error is None
        assert not task.done()
        task._log_destroy_pending = False


def test_it_is_refused_in_a_forked_process(service, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(ExecutionError, match="forked"):
        service.submit(Request("Hello"))
    with pytest.raises(ExecutionError, match="forked"):
        service.close()
    monkeypatch.undo()


def test_a_program_that_forgets_to_close_ends(engine_dirs):
    program = (
        "import sys\n"
        "from qwen2vl_trt import Pipeline, Request, SamplingParams, Service\n"
        "service = Service(Pipeline.from_engine_dir(sys.argv[1], 'cpu'))\n"
        "answer = service.submit(Request('Hello'), SamplingParams(max_tokens=100, ignore_eos=True))\n"
        "next(iter(answer))\n"
        "print('end of the program')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(engine_dirs["torch"])],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end of the program\n", "")
