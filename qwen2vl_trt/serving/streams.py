"""Tokens of answers as they come, and server-sent events of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen2vl_trt.errors import Qwen2VLError
from qwen2vl_trt.runtime.request import Event
from qwen2vl_trt.runtime.service import Answer

from .errors import failed, from_library
from .protocol import StreamOptions
from .responses import Completion, tokens_used
from .tasks import cancelled

KEEP_ALIVE_SECONDS = 15.0

_logger = logging.getLogger(__name__)


class EventStream(Response):
    """Server-sent events of chunks, with a comment where none has come for a while."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], headers: dict[str, str]) -> None:
        super().__init__(headers=headers | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        following = asyncio.ensure_future(anext(self._chunks, None))
        try:
            while True:
                await asyncio.wait([following], timeout=KEEP_ALIVE_SECONDS)
                if not following.done():
                    await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
                    continue
                chunk = following.result()
                if chunk is None:
                    break
                body = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
                following = asyncio.ensure_future(anext(self._chunks, None))
        finally:
            await cancelled(following)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def chunks(
    first: asyncio.Future[tuple[int, Event | None] | None],
    events: AsyncIterator[tuple[int, Event | None]],
    answers: Sequence[Answer],
    completion: Completion,
    options: StreamOptions,
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; an error is the last of them."""
    sent = [0] * len(answers)
    tokens = [0] * len(answers)
    begun = [False] * len(answers)
    try:
        pair = await first
        while pair is not None:
            index, event = pair
            output, chunk = answers[index].output, None
            if event is None:
                chunk = completion.end(index, output, not begun[index], output.text[sent[index] :])
            else:
                tokens[index] += 1
                if event.text or event.logprobs or not begun[index]:
                    chunk = completion.chunk(index, event.text, event.logprobs, not begun[index])
                    sent[index] += len(event.text)
            begun[index] = True
            if chunk is not None:
                if options.include_usage:
                    continuous = bool(options.continuous_usage_stats)
                    chunk["usage"] = tokens_used(output.prompt_tokens, tokens[index]) if continuous else None
                yield chunk
            pair = await anext(events, None)
        if options.include_usage:
            yield completion.usage([answer.output for answer in answers])
    except Qwen2VLError as error:
        yield from_library(error).as_json()
    except Exception:
        _logger.exception("a stream failed")
        yield failed().as_json()


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Event | None], None]:
    """The tokens of answers as they come, by the answer's number, and None at its end; raises what one failed with."""
    queue: asyncio.Queue[tuple[int, Event | None] | Exception] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        try:
            async for event in answer:
                queue.put_nowait((index, event))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(read(*each)) for each in enumerate(answers)]
    left = len(tasks)
    try:
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            left -= found[1] is None
            yield found
    finally:
        await cancelled(*tasks)
