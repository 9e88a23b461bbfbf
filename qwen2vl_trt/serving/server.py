"""The life of a server: the model is loaded while /health answers already, signals drain it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from socket import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen2vl_trt.engines.interrupts import end_at_once
from qwen2vl_trt.errors import Qwen2VLError
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.service import Service

from .app import App

_CUT_SECONDS = 1.0
"""In which streams that are cut end by themselves."""

_logger = logging.getLogger(__name__)


class TimedProtocol(H11Protocol):
    """Closes a connection whose next request is not there in time.

    uvicorn waits without an end for a connection's first byte, for the rest of a header, and for that of a body whose
    request is answered already. A header's bytes are bounded by h11, but not by httptools, which it takes if it can.

    Args:
        seconds: for each of these.
    """

    def __init__(self, *given: Any, seconds: float, **options: Any) -> None:
        super().__init__(*given, **options)
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._timer is None:
            self._timer = self.loop.call_later(self._seconds, self.transport.close)
        elif not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """Serves an application until a signal.

    The first SIGTERM or SIGINT lets the answers under way end, and refuses new requests meanwhile; a second one ends
    at once, and so does one during the load.

    Args:
        app: the application.
        open_pipeline: loads the model, on a thread.
        drain_seconds: for the answers under way.
        config: uvicorn's.

    Attributes:
        failure: why the model could not be loaded, which ends the server.
    """

    def __init__(
        self, app: App, open_pipeline: Callable[[], Pipeline], drain_seconds: float, config: uvicorn.Config
    ) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._application, self._open_pipeline, self._drain_seconds = app, open_pipeline, drain_seconds
        self._drain_end: float | None = None  # by the monotonic clock, once it drains
        self._service: Service | None = None
        self._loading = threading.Thread(target=self._load, name="load-model", daemon=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once; see the class."""
        if self._loading.is_alive():  # nothing to drain, and Python may crash where it ends a thread in PyTorch's code
            end_at_once(sig, frame)
        super().handle_exit(sig, frame)  # it raises the signal again at the end, which decides the exit code
        self.should_exit = self.force_exit = False
        if self._application.draining:
            self._drain_end = 0.0
        self._application.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: asked ten times a second."""
        app = self._application
        if app.draining:
            if self._drain_end is None:
                self._drain_end = time.monotonic() + self._drain_seconds
            late = time.monotonic() - self._drain_end
            if late > 0:
                app.cancel_all()  # each stream says that it was cut
            if not app.bodies.running or late > _CUT_SECONDS:
                self.should_exit = self.force_exit = True
        return await super().on_tick(counter)

    def run(self, sockets: list[socket] | None = None) -> None:
        """Serve, and load the model beside; returns after a signal, or raises why the model could not be loaded."""
        self._loading.start()
        try:
            super().run(sockets)
        finally:
            if self._service is not None:
                self._service.close()
        if self.failure is not None:
            raise self.failure

    def _load(self) -> None:
        try:
            pipeline = self._open_pipeline()
            self._service = Service(pipeline, self._application.settings.limits.pending)
            self._application.open(self._service, pipeline)
            scheme = "https" if self.config.is_ssl else "http"
            addresses = [listener.getsockname()[:2] for server in self.servers for listener in server.sockets]
            for host, port in addresses:
                _logger.info("ready at %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
        except Exception as error:
            if not isinstance(error, Qwen2VLError):
                _logger.exception("the model could not be loaded")
            self.failure = error
            self.should_exit = True
