"""The HTTP application: routes, keys, bodies within limits, answers whole or streamed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import msgspec
from anyio import move_on_after
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen2vl_trt import __version__
from qwen2vl_trt.errors import Qwen2VLError
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Event
from qwen2vl_trt.runtime.service import Answer, Service

from .chat import conversation, sampling_params
from .errors import APIError, from_library, overloaded
from .limits import Limits
from .media import MediaSource
from .metrics import CONTENT_TYPE, Metrics
from .openapi import document
from .page import page
from .protocol import Body, ChatCompletionRequest, TokenizeRequest, parse
from .responses import ChatCompletion

KEEP_ALIVE_SECONDS = 15.0
_CANCEL_SECONDS = 5.0
_OPEN = ("/health", "/ready")  # without a key
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:/?#\[\]@]+)(?::[0-9]+)?")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """What a server is told once.

    Attributes:
        model: the name that clients call the model by.
        api_keys: one of them must come with each request; none asks for none.
        limits: see :class:`~qwen2vl_trt.serving.limits.Limits`.
        allowed_media_domains: see :class:`~qwen2vl_trt.serving.media.MediaSource`.
        allowed_local_media_path: likewise.
        allowed_hosts: names in ``Host`` that are answered, so that no page of another site reaches a server of this
            machine by a name of its own (DNS rebinding); empty answers all.
        strict: a field that nothing knows is 400; else it is named in the header ``X-Ignored-Fields``.
        metrics_prefix: of the names in /metrics.
    """

    model: str
    api_keys: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    allowed_media_domains: Sequence[str] = ()
    allowed_local_media_path: str | None = None
    allowed_hosts: Sequence[str] = ()
    strict: bool = False
    metrics_prefix: str = "qwen2vl:"


class App:
    """An ASGI application over a service, which :meth:`open` gives it once it is loaded.

    Attributes:
        draining: no request is taken any more.
        running: requests to an endpoint that generates, under way.

    Raises:
        MediaError: see :class:`~qwen2vl_trt.serving.media.MediaSource`.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.draining = False
        self.running = 0
        self._service: Service | None = None
        self._pipeline: Pipeline | None = None
        self._source = MediaSource(settings.limits, settings.allowed_media_domains, settings.allowed_local_media_path)
        self._keys = {_digest(key): hashlib.sha256(key.encode()).hexdigest() for key in settings.api_keys}
        self._answers: set[Answer] = set()  # under way
        self._bytes_in_flight = 0
        self._created = int(time.time())
        self.metrics = Metrics(
            settings.metrics_prefix, lambda: None if self._service is None else self._service.counters()
        )
        self._page = page()
        routes = [
            Route("/", self._index),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/version", self._version),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/chat/completions", _Endpoint(self, self._chat), methods=["POST"]),
            Route("/tokenize", _Endpoint(self, self._tokenize), methods=["POST"]),
        ]
        self._app: ASGIApp = Starlette(
            routes=routes,
            exception_handlers={APIError: _on_error, HTTPException: _on_http_error, Exception: _on_crash},
        )

    def open(self, service: Service, pipeline: Pipeline) -> None:
        """Take requests from now on."""
        self._pipeline, self._service = pipeline, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.response(message["status"])
            await send(message)

        try:
            self._admit(Request(scope))
        except APIError as error:
            await _error(error)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _admit(self, request: Request) -> None:
        """See to the host and the key; raises APIError 400 or 401."""
        hosts = self.settings.allowed_hosts
        host = _HOST.fullmatch(request.headers.get("host", ""))
        if hosts and (host is None or host[1].lower() not in hosts):
            raise APIError(400, "the header Host names another server (--allowed-hosts)", code="wrong_host")
        path = request.scope["path"]  # that of request.url depends on the header Host
        if not self._keys or path in _OPEN or (path == "/" and request.method in ("GET", "HEAD")):
            return
        if self._key(request) is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "an API key is missing or wrong (Authorization: Bearer ...)", headers=headers)

    def _key(self, request: Request) -> str | None:
        """What caches of the request's key are salted with; None for an unknown key. All keys are compared."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = [salt for digest, salt in self._keys.items() if hmac.compare_digest(digest, given)]
        return found[0] if found else None

    # GET

    async def _index(self, request: Request) -> Response:
        body, headers = self._page
        return Response(body, headers=headers)

    async def _health(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        self.check_open()
        return _json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.text), media_type=CONTENT_TYPE)

    async def _version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def _openapi(self, request: Request) -> Response:
        return _json(document())

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self.settings.model, "object": "model", "created": self._created, "owned_by": "qwen2vl-trt"}
        if self._pipeline is None:
            return card
        settings, vision = self._pipeline.settings, self._pipeline.engines.checkpoint.config.vision
        return card | {
            "max_model_len": self._pipeline.profile.max_seq_len,
            "min_pixels": settings.image.min_pixels,
            "max_pixels": settings.image.max_pixels,
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
        }

    # POST

    async def _tokenize(self, request: Request, body: bytearray, stack: AsyncExitStack) -> Response:
        pipeline, _ = self.check_open()
        parsed, headers = await self._parsed(body, TokenizeRequest)
        self._check_model(parsed.model)
        asked = await conversation(parsed, self._source, self.settings.limits)
        prompt = await asyncio.to_thread(pipeline.tokenize, asked)
        config = pipeline.engines.checkpoint.config
        media = sum(prompt.token_ids.count(token) for token in (config.image_token_id, config.video_token_id))
        counts = {"count": len(prompt.token_ids), "image_tokens": media, "max_model_len": pipeline.profile.max_seq_len}
        return _json({**counts, "tokens": prompt.token_ids}, headers=headers)

    async def _chat(self, request: Request, body: bytearray, stack: AsyncExitStack) -> Response:
        pipeline, service = self.check_open()
        parsed, headers = await self._parsed(body, ChatCompletionRequest)
        self._check_model(parsed.model)
        params = await asyncio.to_thread(sampling_params, parsed, self.settings.limits)
        began = time.perf_counter()
        salt = self._key(request) if self._keys else None
        asked = await conversation(parsed, self._source, self.settings.limits, salt, parsed.timeout)
        self.metrics.observe("media_fetch_seconds", time.perf_counter() - began)
        answers = []
        for each in params:
            answers.append(service.submit(asked, each))
            self._answers.add(answers[-1])
            stack.push_async_callback(self._settle, answers[-1])
        events = _merged(answers, self.metrics)
        stack.push_async_callback(events.aclose)
        completion = ChatCompletion(self.settings.model, _token_bytes(pipeline))
        if not parsed.stream:
            async for _ in events:
                pass
            for answer in answers:
                if answer.output.error is not None:
                    raise answer.output.error
            whole = completion.whole([answer.output for answer in answers])
            return _json(whole, headers=headers)
        usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
        # What is wrong with a request is known before its first token, while there is still a status to send.
        first = asyncio.ensure_future(anext(events, None))
        stack.push_async_callback(_cancelled, first)
        await asyncio.wait([first], timeout=KEEP_ALIVE_SECONDS)
        if first.done():
            first.result()
        return _EventStream(_chunks(first, events, answers, completion, usage), headers)

    async def _settle(self, answer: Answer) -> None:
        """The client has its answer, or has hung up, and the answer ends within a step."""
        answer.cancel()
        with move_on_after(_CANCEL_SECONDS):
            await answer
        self._answers.discard(answer)
        self.metrics.answer(answer.output)

    def end(self) -> None:
        """One of ``running`` has ended."""
        self.running -= 1

    def cancel_all(self) -> None:
        """End the answers under way; their streams say so."""
        for answer in [*self._answers]:
            answer.cancel()

    def check_open(self) -> tuple[Pipeline, Service]:
        if self.draining:
            raise overloaded("the server is stopping and takes no more requests")
        if self._pipeline is None or self._service is None:
            raise overloaded("the model is being loaded; try again later")
        return self._pipeline, self._service

    def _check_model(self, name: str | None) -> None:
        if name and name != self.settings.model:
            message = f"there is no such model; this server has {self.settings.model}"
            raise APIError(404, message, param="model", code="model_not_found")

    async def _parsed(self, body: bytearray, kind: type[Body]) -> tuple[Body, dict[str, str]]:
        parsed, unknown = await asyncio.to_thread(parse, body, kind)
        if not unknown:
            return parsed, {}
        names = ", ".join(quote(name[:64], safe="") for name in unknown[:16])
        if self.settings.strict:
            raise APIError(400, f"unknown fields: {names}", param=unknown[0][:64])
        return parsed, {"X-Ignored-Fields": names}

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request; its bytes count as held until the request has ended.

        Raises:
            APIError: 408, 413, 415, or 503 where too many bytes are held.
        """
        limits = self.settings.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise APIError(415, "Content-Type must be application/json")
        length = request.headers.get("content-length", "")
        too_large = APIError(
            413, f"the body is larger than {limits.body_bytes:,} bytes", headers={"Connection": "close"}
        )
        if length.isdecimal() and int(length) > limits.body_bytes:
            raise too_large
        whole = bytearray()
        try:
            with move_on_after(limits.body_seconds) as patience:
                async for piece in request.stream():
                    whole += piece
                    self._bytes_in_flight += len(piece)
                    if len(whole) > limits.body_bytes:
                        raise too_large
                    if self._bytes_in_flight > limits.body_bytes_in_flight:
                        raise overloaded("the bodies of other requests take all memory for them; try again later")
            if patience.cancelled_caught:
                message = f"the body was not there after {limits.body_seconds:g} s"
                raise APIError(408, message, headers={"Connection": "close"})
            yield whole
        finally:
            self._bytes_in_flight -= len(whole)


class _Endpoint:
    """A handler with a body that ends when its client hangs up."""

    def __init__(self, app: App, handler: Callable[[Request, bytearray, AsyncExitStack], Awaitable[Response]]) -> None:
        self._app, self._handler = app, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._app.check_open()
        with suppress(ClientDisconnect):
            await self._serve(Request(scope, receive), scope, receive, send)

    async def _serve(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            body = await stack.enter_async_context(self._app.body(request))
            self._app.running += 1
            stack.callback(self._app.end)
            work = asyncio.ensure_future(self._respond(request, body, stack, scope, receive, send))
            del body
            gone = asyncio.ensure_future(_hang_up(receive))
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    return
                work.result()
            finally:
                await _cancelled(work, gone)

    async def _respond(
        self, request: Request, body: bytearray, stack: AsyncExitStack, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            response = await self._handler(request, body, stack)
        except Qwen2VLError as error:
            response = _error(_translated(error))
        except APIError as error:
            response = _error(error)
        except RecursionError:
            response = _error(APIError(400, "the body is nested too deeply"))
        await response(scope, receive, send)


class _EventStream(Response):
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
            await _cancelled(following)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _chunks(
    first: asyncio.Future[tuple[int, Event | None] | None],
    events: AsyncIterator[tuple[int, Event | None]],
    answers: Sequence[Answer],
    completion: ChatCompletion,
    usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream; an error is the last of them."""
    sent = [0] * len(answers)
    begun = [False] * len(answers)
    try:
        pair = await first
        while pair is not None:
            index, event = pair
            if event is None:
                output = answers[index].output
                yield completion.end(index, output, not begun[index], output.text[sent[index] :])
            elif event.text or event.logprobs or not begun[index]:
                yield completion.chunk(index, event.text, event.logprobs, not begun[index])
                sent[index] += len(event.text)
            begun[index] = True
            pair = await anext(events, None)
        if usage:
            yield completion.usage([answer.output for answer in answers])
    except Qwen2VLError as error:
        yield _translated(error).as_json()
    except Exception:
        _logger.exception("a stream failed")
        yield APIError(500, "the server failed at this request; its log says why").as_json()


async def _merged(answers: Sequence[Answer], metrics: Metrics) -> AsyncGenerator[tuple[int, Event | None], None]:
    """The tokens of answers as they come, by the answer's number, and None at its end; raises what one failed with."""
    queue: asyncio.Queue[tuple[int, Event | None] | Exception] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        last = None
        try:
            async for event in answer:
                now = time.perf_counter()
                if last is not None:
                    metrics.observe("inter_token_latency_seconds", now - last)
                last = now
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
        await _cancelled(*tasks)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait for their end; what they raise is lost."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _token_bytes(pipeline: Pipeline) -> Callable[[int], bytes]:
    """Bytes of a token: byte-level tokenizers, as all of Qwen are, write each byte as a letter."""
    tokenizer = pipeline.tokenizer

    def token_bytes(token_id: int) -> bytes:
        token = tokenizer.id_to_token(token_id) or ""
        letters = _byte_letters()
        return bytes(map(letters.__getitem__, token)) if all(map(letters.__contains__, token)) else token.encode()

    return token_bytes


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter of each byte, from GPT-2 (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _translated(error: Qwen2VLError) -> APIError:
    told = from_library(error)
    if told.status == 500:
        _logger.error("%s", error)
    return told


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _error(error: APIError) -> Response:
    return _json(error.as_json(), error.status, error.headers)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _error(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such address", 405: f"{request.method} is not allowed here"}
    message = words.get(error.status_code, error.detail)
    return _error(APIError(error.status_code, message, headers=error.headers))


async def _on_crash(request: Request, error: Exception) -> Response:
    return _error(APIError(500, "the server failed at this request; its log says why"))
