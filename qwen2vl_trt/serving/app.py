"""The HTTP application: routes, hosts and keys, and what each address does."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import quote

from anyio import move_on_after
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen2vl_trt import __version__
from qwen2vl_trt.errors import Qwen2VLError
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.request import Request as PipelineRequest
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.runtime.service import Answer, Service

from .chat import Conversation, sampling_params
from .completions import PlainPrompt, TextCompletion, check_completion, echoes, plain_prompts
from .embeddings import check_alone, check_embedding, embeddings
from .endpoint import Bodies, Endpoint, as_error, as_json
from .errors import APIError, failed, from_library, overloaded
from .limits import Limits
from .media import MediaSource
from .metrics import CONTENT_TYPE, Metrics
from .openapi import document
from .page import page
from .protocol import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    StreamOptions,
    TokenizeRequest,
    parse,
)
from .responses import ChatCompletion, Completion
from .streams import KEEP_ALIVE_SECONDS, EventStream, chunks, merged
from .tasks import cancelled
from .tool_calls import ToolCompletion, usable_tools, with_calls

T = TypeVar("T")

_CANCEL_SECONDS = 5.0
_TOKENIZERS = 2
_OPEN = ("/health", "/ready")  # without a key
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:/?#\[\]@]+)(?::[0-9]+)?")


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
        adapters: names of LoRA adapters, which clients call as models.
    """

    model: str
    api_keys: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    allowed_media_domains: Sequence[str] = ()
    allowed_local_media_path: str | None = None
    allowed_hosts: Sequence[str] = ()
    strict: bool = False
    metrics_prefix: str = "qwen2vl:"
    adapters: Sequence[str] = ()


class App:
    """An ASGI application over a service, which :meth:`open` gives it once it is loaded.

    Attributes:
        draining: no request is taken any more.
        bodies: of the requests under way.

    Raises:
        MediaError: see :class:`~qwen2vl_trt.serving.media.MediaSource`.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.draining = False
        self._service: Service | None = None
        self._pipeline: Pipeline | None = None
        self._source = MediaSource(settings.limits, settings.allowed_media_domains, settings.allowed_local_media_path)
        self._keys = [_digest(key) for key in settings.api_keys]
        self._answers: set[Answer] = set()  # under way
        self.bodies = Bodies(settings.limits)
        # Not asyncio's own threads: images and videos that are only counted would hold all of them.
        self._tokenizers = ThreadPoolExecutor(_TOKENIZERS, thread_name_prefix="tokenize")
        self._created = int(time.time())
        self.metrics = Metrics(
            settings.metrics_prefix, lambda: None if self._service is None else self._service.counters()
        )
        self._page = page()
        self._app: ASGIApp = Starlette(
            routes=self._routes(),
            exception_handlers=dict.fromkeys(
                (APIError, Qwen2VLError, RecursionError, HTTPException, Exception), _on_error
            ),
        )

    def _routes(self) -> list[Route]:
        return [
            Route("/", self._index),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/version", self._version),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/chat/completions", Endpoint(self.bodies, self.check_open, self._chat), methods=["POST"]),
            Route("/v1/completions", Endpoint(self.bodies, self.check_open, self._completions), methods=["POST"]),
            Route("/v1/embeddings", Endpoint(self.bodies, self.check_open, self._embeddings), methods=["POST"]),
            Route("/tokenize", Endpoint(self.bodies, self.check_open, self._tokenize), methods=["POST"]),
        ]

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
            await as_error(error)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _admit(self, request: Request) -> None:
        """See to the host and the key, which ``state.cache_salt`` follows; raises APIError 400 or 401."""
        request.state.cache_salt = None
        hosts = self.settings.allowed_hosts
        host = _HOST.fullmatch(request.headers.get("host", ""))
        if hosts and (host is None or host[1].lower() not in hosts):
            raise APIError(400, "the header Host names another server (--allowed-hosts)", code="wrong_host")
        path = request.scope["path"]  # that of request.url depends on the header Host
        if not self._keys or path in _OPEN or (path == "/" and request.method in ("GET", "HEAD")):
            return
        request.state.cache_salt = self._key(request)
        if request.state.cache_salt is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "an API key is missing or wrong (Authorization: Bearer ...)", headers=headers)

    def _key(self, request: Request) -> str | None:
        """What caches of the request's key are salted with; None for an unknown key. All keys are compared."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = [digest for digest in self._keys if hmac.compare_digest(digest, given)]
        return found[0].hex() if found else None

    # GET

    async def _index(self, request: Request) -> Response:
        body, headers = self._page
        return Response(body, headers=headers)

    async def _health(self, request: Request) -> Response:
        return as_json({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        self.check_open()
        return as_json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self.metrics.text), media_type=CONTENT_TYPE)

    async def _version(self, request: Request) -> Response:
        return as_json({"version": __version__})

    async def _openapi(self, request: Request) -> Response:
        return as_json(document())

    async def _models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": [self._card(name) for name in (None, *self.settings.adapters)]})

    async def _model(self, request: Request) -> Response:
        return as_json(self._card(self._adapter(request.path_params["model"])))

    def _card(self, adapter: str | None) -> dict[str, Any]:
        model = self.settings.model
        card = {"id": adapter or model, "object": "model", "created": self._created, "owned_by": "qwen2vl-trt"}
        if adapter:
            card["parent"] = model
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

        def use(parsed: TokenizeRequest) -> tuple[str | Conversation, list[dict[str, Any]]]:
            if (parsed.prompt is None) == (parsed.messages is None):
                raise APIError(400, "prompt: give either prompt or messages", param="prompt")
            if parsed.prompt is not None:
                return parsed.prompt, []
            return Conversation.of(parsed, self.settings.limits), usable_tools(parsed, self.settings.limits)

        _, _, (given, tools), headers = await self._read(body, TokenizeRequest, use)
        loop = asyncio.get_running_loop()
        if isinstance(given, str):
            ids = await loop.run_in_executor(self._tokenizers, pipeline.encode, given)
        else:
            asked = await self._fetched(given, request, tools=tools)
            ids = (await loop.run_in_executor(self._tokenizers, pipeline.tokenize, asked)).token_ids
        config = pipeline.engines.checkpoint.config
        media = sum(ids.count(token) for token in (config.image_token_id, config.video_token_id))
        counts = {"count": len(ids), "image_tokens": media, "max_model_len": pipeline.profile.max_seq_len}
        return as_json({**counts, "tokens": ids}, headers=headers)

    async def _fetched(
        self,
        conversation: Conversation,
        request: Request,
        deadline: float | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> PipelineRequest:
        """See :meth:`~qwen2vl_trt.serving.chat.Conversation.fetched`; its media are held with the body."""
        began = time.perf_counter()
        hold, salt = request.state.hold, request.state.cache_salt
        found = await conversation.fetched(self._source, hold, salt, deadline, tools)
        if found.images or found.videos:
            self.metrics.observe("media_fetch_seconds", time.perf_counter() - began)
        return found

    async def _chat(self, request: Request, body: bytearray, stack: AsyncExitStack) -> Response:
        pipeline, service = self.check_open()
        limits = self.settings.limits

        def use(parsed: ChatCompletionRequest) -> tuple[list[SamplingParams], list[dict[str, Any]], Conversation]:
            params, tools = sampling_params(parsed, limits), usable_tools(parsed, limits)
            return with_calls(parsed, params, tools, pipeline.tokenizer), tools, Conversation.of(parsed, limits)

        parsed, adapter, (params, tools, conversation), headers = await self._read(body, ChatCompletionRequest, use)
        model = adapter or self.settings.model
        asked = replace(await self._fetched(conversation, request, parsed.timeout, tools), adapter=adapter)
        completion = ChatCompletion(model, pipeline.tokenizer)
        if tools:
            several = parsed.parallel_tool_calls is not False
            completion = ToolCompletion(model, pipeline.tokenizer, several)
        return await self._generate(service, [(asked, each) for each in params], completion, parsed, headers, stack)

    async def _completions(self, request: Request, body: bytearray, stack: AsyncExitStack) -> Response:
        pipeline, service = self.check_open()
        limits, salt = self.settings.limits, request.state.cache_salt

        def use(parsed: CompletionRequest) -> tuple[list[SamplingParams], list[PlainPrompt], list[str]]:
            check_completion(parsed)
            params = sampling_params(parsed, limits)
            prompts = plain_prompts(parsed.prompt, "prompt", len(params), pipeline, limits)
            return params, prompts, echoes(prompts, pipeline.tokenizer) if parsed.echo else [""] * len(prompts)

        parsed, adapter, (params, prompts, texts), headers = await self._read(body, CompletionRequest, use)
        requests = [
            PipelineRequest(each.token_ids, deadline=parsed.timeout, cache_salt=salt, adapter=adapter)
            for each in prompts
        ]
        asked = [(each, own) for each in requests for own in params]
        starts = [text for text in texts for _ in params]
        completion = TextCompletion(adapter or self.settings.model, pipeline.tokenizer, starts, len(prompts))
        return await self._generate(service, asked, completion, parsed, headers, stack)

    async def _generate(
        self,
        service: Service,
        asked: Sequence[tuple[PipelineRequest, SamplingParams]],
        completion: Completion,
        body: GenerationRequest,
        headers: dict[str, str],
        stack: AsyncExitStack,
    ) -> Response:
        """The answers to requests, whole or as a stream."""
        answers = self._submit(service, asked, stack)
        if not body.stream:
            outputs = await asyncio.gather(*map(_succeeded, answers))
            return await asyncio.to_thread(lambda: as_json(completion.whole(outputs), headers=headers))
        events = merged(answers)
        stack.push_async_callback(events.aclose)
        # What is wrong with a request is known before its first token, while there is still a status to send.
        first = asyncio.ensure_future(anext(events, None))
        stack.push_async_callback(cancelled, first)
        await asyncio.wait([first], timeout=KEEP_ALIVE_SECONDS)
        if first.done():
            first.result()
        options = body.stream_options or StreamOptions()
        return EventStream(chunks(first, events, answers, completion, options), headers)

    async def _embeddings(self, request: Request, body: bytearray, stack: AsyncExitStack) -> Response:
        pipeline, service = self.check_open()
        limits, salt = self.settings.limits, request.state.cache_salt

        def use(parsed: EmbeddingRequest) -> Conversation | list[PlainPrompt]:
            check_embedding(parsed, pipeline.engines)
            if parsed.input is None:
                return Conversation.of(parsed, limits)
            return plain_prompts(parsed.input, "input", 1, pipeline, limits)

        parsed, adapter, given, headers = await self._read(body, EmbeddingRequest, use)
        if isinstance(given, Conversation):
            asked = [await self._fetched(given, request, parsed.timeout)]
            check_alone(parsed, asked[0])
        else:
            asked = [PipelineRequest(each.token_ids, deadline=parsed.timeout, cache_salt=salt) for each in given]
        wanted = [(replace(each, features=parsed.pooling, adapter=adapter), None) for each in asked]
        outputs = await asyncio.gather(*map(_succeeded, self._submit(service, wanted, stack)))
        return await asyncio.to_thread(
            lambda: as_json(embeddings(parsed, adapter or self.settings.model, outputs), headers=headers)
        )

    def _submit(
        self,
        service: Service,
        asked: Sequence[tuple[PipelineRequest, SamplingParams | None]],
        stack: AsyncExitStack,
    ) -> list[Answer]:
        """Queue requests; the stack ends them."""
        answers: list[Answer] = []
        stack.push_async_callback(self._settle, answers)
        for each in asked:
            answers.append(service.submit(*each))
            self._answers.add(answers[-1])
        return answers

    async def _settle(self, answers: Sequence[Answer]) -> None:
        """The client has its answers, or has hung up, and they end within a step."""
        for answer in answers:
            answer.cancel()
        with move_on_after(_CANCEL_SECONDS):
            for answer in answers:
                await answer
        self._answers.difference_update(answers)
        await asyncio.to_thread(self.metrics.answers, answers)  # an observation a token

    def cancel_all(self) -> None:
        """End the answers under way; their streams say so."""
        for answer in [*self._answers]:
            answer.cancel()

    def check_open(self) -> tuple[Pipeline, Service]:
        """What answers requests; raises APIError 503 before it is loaded, once it has failed or the server drains."""
        if self.draining:
            raise overloaded("the server is stopping and takes no more requests")
        if self._pipeline is None or self._service is None:
            raise overloaded("the model is being loaded; try again later")
        if self._service.closed is not None:  # its log says why
            raise overloaded("the server takes no more requests now; try again later")
        return self._pipeline, self._service

    def _adapter(self, name: str | None) -> str | None:
        """The adapter that a request's ``model`` names, None for the model itself; raises APIError 404 for another."""
        if not name or name == self.settings.model:
            return None
        if name in self.settings.adapters:
            return name
        message = f"there is no such model; this server has {', '.join((self.settings.model, *self.settings.adapters))}"
        raise APIError(404, message, param="model", code="model_not_found")

    async def _read(
        self, body: bytearray, kind: type[Body], use: Callable[[Body], T]
    ) -> tuple[Body, str | None, T, dict[str, str]]:
        """Parse a body and ``use`` it, on one thread: each more costs as much as the parsing.

        Returns:
            The body, the adapter that its ``model`` names, what ``use`` made of it, and headers to send.
        """

        def read() -> tuple[Body, str | None, T, dict[str, str]]:
            parsed, unknown = parse(body, kind)
            names = ", ".join(quote(name[:64], safe="") for name in unknown[:16])
            if unknown and self.settings.strict:
                raise APIError(400, f"unknown fields: {names}", param=unknown[0][:64])
            adapter = self._adapter(parsed.model)
            return parsed, adapter, use(parsed), {"X-Ignored-Fields": names} if unknown else {}

        return await asyncio.to_thread(read)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


async def _succeeded(answer: Answer) -> Output:
    """The output of an answer, once it has ended; raises what it failed with."""
    output = await answer
    if output.error is not None:
        raise output.error
    return output


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Qwen2VLError):
        error = from_library(error)
    elif isinstance(error, RecursionError):
        error = APIError(400, "the body is nested too deeply")
    elif isinstance(error, HTTPException):
        words = {404: "there is no such address", 405: f"{request.method} is not allowed here"}
        message = words.get(error.status_code, error.detail)
        error = APIError(error.status_code, message, headers=error.headers)
    return as_error(error if isinstance(error, APIError) else failed())
