"""A connection that waits for its next request: the time that it has, by timers that the test fires itself."""

import asyncio
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
from uvicorn.server import ServerState  # noqa: E402

from qwen2vl_trt.serving.server import TimedProtocol  # noqa: E402

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
SECONDS, KEEP_ALIVE = 30.0, 5


class Loop:
    """The running loop, whose timers never fire by themselves."""

    def __init__(self):
        self._loop, self.timers = asyncio.get_running_loop(), []

    def __getattr__(self, name):
        return getattr(self._loop, name)

    def call_later(self, seconds, call):
        timer = SimpleNamespace(seconds=seconds, call=call)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    @property
    def seconds(self):
        return [timer.seconds for timer in self.timers]


def connected(run):
    """Runs ``run(protocol, loop, transport, answer)``; requests are answered, body or not, once ``answer`` is set."""

    async def main():
        answer = asyncio.Event()

        async def app(scope, receive, send):
            await answer.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

        loop, transport = Loop(), Mock(spec=asyncio.Transport)
        transport.get_extra_info.return_value = transport.is_closing.return_value = None
        config = uvicorn.Config(app, lifespan="off", ws="none", log_level="error", timeout_keep_alive=KEEP_ALIVE)
        protocol = TimedProtocol(config, ServerState(), {}, loop, seconds=SECONDS)
        protocol.connection_made(transport)
        await run(protocol, loop, transport, answer)

    asyncio.run(main())


async def settled(protocol):
    while not protocol.cycle.response_complete:
        await asyncio.sleep(0)


def test_a_header_has_one_time_whatever_comes_of_it():
    async def run(protocol, loop, transport, answer):
        (timer,) = loop.timers  # before a byte has come
        for position in range(len(REQUEST) - 1):
            protocol.data_received(REQUEST[position : position + 1])
            assert loop.timers == [timer]
        assert timer.seconds == SECONDS
        transport.close.assert_not_called()
        timer.call()
        transport.close.assert_called_once()

    connected(run)


def test_an_answer_has_all_the_time_that_it_needs():
    async def run(protocol, loop, transport, answer):
        protocol.data_received(REQUEST)
        assert loop.timers == []
        answer.set()
        await settled(protocol)
        assert loop.seconds == [KEEP_ALIVE]
        protocol.data_received(REQUEST[:5])  # ends uvicorn's wait for the next request
        assert loop.seconds == [SECONDS]
        answer.clear()
        protocol.data_received(REQUEST[5:])
        assert loop.timers == []

    connected(run)


def test_a_body_that_nobody_reads_any_more():
    async def run(protocol, loop, transport, answer):
        answer.set()
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n")
        await settled(protocol)
        for _ in range(3):
            protocol.data_received(b"x")
            assert loop.seconds == [SECONDS]

    connected(run)


def test_a_connection_that_is_lost_leaves_no_timer():
    async def run(protocol, loop, transport, answer):
        protocol.connection_lost(None)
        assert loop.timers == []

    connected(run)


def test_a_header_that_is_too_large():
    """h11's bound, which httptools does not have."""

    async def run(protocol, loop, transport, answer):
        protocol.data_received(REQUEST[:-2] + b"X: " + b"x" * (1 << 17))
        transport.close.assert_called_once()

    connected(run)
