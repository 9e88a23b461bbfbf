"""A replica without Ray: the application called with a whole request."""

import asyncio
import json

import pytest

pytest.importorskip("mmh3", reason="ray[serve] is not installed")
from qwen2vl_trt import PipelineOptions
from qwen2vl_trt.serving.app import ServerSettings
from qwen2vl_trt.serving.errors import APIError
from qwen2vl_trt.serving.replica import Replica
from tests.support.engine_folders import build


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    return build("tiny", tmp_path_factory.mktemp("replica") / "engines", "torch")


def with_replica(engine_dir, use):
    async def run():
        replica = Replica.__new__(Replica)
        await replica.__init__(ServerSettings("tiny"), engine_dir, "cpu", PipelineOptions())
        try:
            await use(replica)
        finally:
            await asyncio.to_thread(replica.__del__)

    asyncio.run(run())


def question(**fields):
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    return scope, json.dumps({"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, **fields}).encode()


def test_an_answer_is_what_the_application_sends(engine_dir):
    async def use(replica):
        messages = [message async for some in replica.answer(*question(max_tokens=3)) for message in some]
        start, body = messages
        assert (start["status"], body.get("more_body", False)) == (200, False)
        assert json.loads(body["body"])["usage"]["completion_tokens"] == 3

    with_replica(engine_dir, use)


def test_leaving_it_cancels(engine_dir):
    async def use(replica):
        answer = replica.answer(*question(max_tokens=200, stream=True))
        first = await anext(answer)
        assert first[0]["status"] == 200, first
        await answer.aclose()
        counters = replica._service.counters()
        assert (counters.cancelled, counters.running) == (1, 0)

    with_replica(engine_dir, use)


def test_one_whose_service_has_ended_is_not_healthy(engine_dir):
    async def use(replica):
        await replica.check_health()
        await asyncio.to_thread(replica._service.close)
        with pytest.raises(APIError, match="takes no more requests"):
            await replica.check_health()
        (start, _), *_ = [some async for some in replica.answer(*question())]
        assert start["status"] == 503

    with_replica(engine_dir, use)
