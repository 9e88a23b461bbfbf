"""What stands before several replicas: it holds each request until one answers; if that dies, another gets it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from prometheus_client import CollectorRegistry, Metric, generate_latest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from .app import App, ServerSettings
from .endpoint import Endpoint, as_json
from .errors import APIError, overloaded
from .metrics import CONTENT_TYPE
from .protocol import check_values

_ATTEMPTS = 4
"""Replicas that may be lost with one request in hand, which may be what they are lost by."""
_COUNTED_HERE = "http_responses"
_CUT_SECONDS = 1.0
"""In which streams that are cut end by themselves."""
_REPLICA_SECONDS = 2.0
"""For what a replica answers at once."""
_SCOPE = {"type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client"}
"""What an application reads of it; the rest does not leave the process."""

_logger = logging.getLogger(__name__)


class Front(App):
    """An application whose requests are answered by replicas.

    Hosts, keys and the limits of bodies are seen to here: what is refused reaches no replica.

    Args:
        settings: those of the replicas' applications.
        replicas: of :class:`~qwen2vl_trt.serving.replica.Replica`.
    """

    def __init__(self, settings: ServerSettings, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        super().__init__(settings)

    def _routes(self) -> list[Route]:
        body = Endpoint(self.bodies, self._check_draining, self._forward)
        return [
            Route(route.path, body, methods=["POST"])
            if isinstance(route.endpoint, Endpoint)
            else Route(route.path, self._get)
            if route.path.startswith("/v1/models")
            else route
            for route in super()._routes()
        ]

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those under way; after so many seconds they are cut."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.bodies.running and time.monotonic() < end + _CUT_SECONDS:
            if time.monotonic() > end:
                with suppress(APIError):
                    await self._of_all("cancel_all")
            await asyncio.sleep(_CUT_SECONDS / 10)

    async def _of_all(self, method: str) -> list[Any]:
        """What a method of every replica returns, but for those that are lost meanwhile."""
        try:
            asked = self._replicas.broadcast(method)
            found = await asked.results_async(timeout_s=_REPLICA_SECONDS, return_exceptions=True)
        except TimeoutError:
            raise overloaded("a replica does not answer; try again later") from None
        except RayServeException:  # all of them were lost
            raise overloaded("no replica is ready; try again later") from None
        return [each for each in found if not isinstance(each, Exception)]

    def _check_draining(self) -> None:
        if self.draining:
            raise overloaded("the server is stopping and takes no more requests")

    async def _ready(self, request: Request) -> Response:
        self._check_draining()
        if not await self._of_all("check_health"):
            raise overloaded("no replica is ready; try again later")
        return as_json({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        """Those of every replica, and the responses as clients got them, which are counted here."""
        families = {family.name: family for family in self.metrics.families() if family.name.endswith(_COUNTED_HERE)}
        for replica in await self._of_all("metrics"):
            for family in replica:
                if not family.name.endswith(_COUNTED_HERE):
                    known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    known.samples += family.samples
        registry = cast(CollectorRegistry, SimpleNamespace(collect=families.values))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE)

    async def _get(self, request: Request) -> Response:
        return Relayed(self._replicas, request.scope, b"", "")

    async def _forward(self, request: Request, body: bytearray, stack: AsyncExitStack) -> Response:
        key = await asyncio.to_thread(conversation_key, body)
        return Relayed(self._replicas, request.scope, body, key)


class Relayed(Response):
    """The answer of a replica; that of another where the first is lost before anything of its answer was sent on.

    Args:
        replicas: to choose from.
        scope: of the request.
        body: all of it.
        key: requests with one key go to one replica, while it is there and has room; empty for any.
    """

    def __init__(self, replicas: DeploymentHandle, scope: Scope, body: bytes | bytearray, key: str) -> None:
        super().__init__()
        self._replicas = replicas.options(stream=True, session_id=key)
        self._scope, self._body = {name: value for name, value in scope.items() if name in _SCOPE}, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(_ATTEMPTS):
            start: Message | None = None
            begun = over = False
            try:
                async with aclosing(self._messages()) as messages:
                    async for message in messages:
                        if start is None:
                            start = message  # kept until there is a body behind it
                            continue
                        if not begun:
                            await send(start)
                            begun = True
                        await send(message)
                        over = not message.get("more_body")
                return
            except RayActorError as error:
                if over:  # lost between its last words and its end
                    return
                _logger.warning("a replica was lost with a request in hand: %s", error)
                if begun:
                    await _cut(Headers(raw=start["headers"]) if start else Headers(), send)
                    return
            except RayServeException:  # too many wait, or it does not run
                if begun:
                    raise
                raise overloaded("no replica takes the request now; try again later") from None
        raise APIError(500, "the replicas that had this request in hand were lost; it is not tried again")

    async def _messages(self) -> AsyncGenerator[Message, None]:
        answer: Any = self._replicas.answer.remote(self._scope, self._body)
        try:
            async for messages in answer:
                for message in messages:
                    yield message
        finally:
            answer.cancel()


async def _cut(headers: Headers, send: Send) -> None:
    """End an answer whose replica was lost in the middle of it: a stream says so, another breaks off."""
    lost = APIError(500, "the replica that answered was lost; ask again")
    if not headers.get("content-type", "").startswith("text/event-stream"):
        raise lost
    body = b"data: " + msgspec.json.encode(lost.as_json()) + b"\n\ndata: [DONE]\n\n"
    await send({"type": "http.response.body", "body": body})


class _Asked(msgspec.Struct):
    messages: list[msgspec.Raw] = []
    prompt: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct):
    role: Any = None


def conversation_key(body: bytes | bytearray) -> str:
    """A hash of the beginning that all turns of a conversation have: the messages up to the user's first, images
    included; of a text its first 1,024 bytes. Empty where the body is none of these, which its replica will say.

    Raises:
        APIError: 413, too many values.
    """
    check_values(body)
    try:
        asked = msgspec.json.decode(body, type=_Asked)
        roles = [msgspec.json.decode(message, type=_Message).role for message in asked.messages]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    first = roles.index("user") + 1 if "user" in roles else len(roles)
    pieces = [*asked.messages[:first], bytes(asked.prompt)[:1024]]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest() if any(pieces) else ""
