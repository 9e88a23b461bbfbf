"""What every endpoint with a body has in common: its limits, JSON, and an end where the client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import msgspec
from anyio import move_on_after
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .errors import APIError, overloaded
from .limits import Limits
from .tasks import cancelled


class Bodies:
    """Reads the bodies of requests.

    Attributes:
        held: bytes of all bodies, and of what is fetched for them.
        running: requests that have their body and are under way.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.held, self.running = limits, 0, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request; its bytes count as held until the request has ended.

        ``request.state.hold`` counts more bytes likewise: it is called with their number, and raises APIError 503 too.

        Raises:
            APIError: 408, 413, 415, or 503 where too many bytes are held.
        """
        limits = self.limits
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
        with self._holding() as hold:
            with move_on_after(limits.body_seconds) as patience:
                async for piece in request.stream():
                    whole += piece
                    if len(whole) > limits.body_bytes:
                        raise too_large
                    hold(len(piece))
            if patience.cancelled_caught:
                message = f"the body was not there after {limits.body_seconds:g} s"
                raise APIError(408, message, headers={"Connection": "close"})
            request.state.hold = hold
            self.running += 1
            try:
                yield whole
            finally:
                self.running -= 1

    @contextmanager
    def _holding(self) -> Iterator[Callable[[int], None]]:
        own = 0

        def hold(size: int) -> None:
            nonlocal own
            own += size
            self.held += size
            if self.held > self.limits.body_bytes_in_flight:
                raise overloaded("other requests take all memory for bodies and media; try again later")

        try:
            yield hold
        finally:
            self.held -= own


class Endpoint:
    """A handler with a body that ends when its client hangs up, or takes nothing of the answer."""

    def __init__(
        self,
        bodies: Bodies,
        check_open: Callable[[], object],
        handler: Callable[[Request, bytearray, AsyncExitStack], Awaitable[Response]],
    ) -> None:
        self._bodies, self._check_open, self._handler = bodies, check_open, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_open()
        with suppress(ClientDisconnect):
            await self._serve(Request(scope, receive), scope, receive, send)

    async def _serve(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            body = await stack.enter_async_context(self._bodies.read(request))
            work = asyncio.ensure_future(self._respond(request, body, stack, scope, receive, send))
            del body
            gone = asyncio.ensure_future(_hang_up(receive))
            try:
                await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    return
                work.result()
            finally:
                await cancelled(work, gone)

    async def _respond(
        self, request: Request, body: bytearray, stack: AsyncExitStack, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async def taken(message: Message) -> None:
            with move_on_after(self._bodies.limits.send_seconds) as patience:
                await send(message)
            if patience.cancelled_caught:
                raise ClientDisconnect

        response = await self._handler(request, body, stack)
        await response(scope, receive, taken)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def as_error(error: APIError) -> Response:
    """The response of an error."""
    return as_json(error.as_json(), error.status, error.headers)
