"""One of several copies of the model: the application over a service of its own, called with whole requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from prometheus_client import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Scope

from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.service import Service

from .app import App, ServerSettings
from .encoder import RemoteVision
from .tasks import cancelled


class Replica:
    """A deployment of Ray Serve.

    Args:
        settings: of the application.
        engine_dir: opened here, on a GPU of its own where Ray gives it one.
        device: see :meth:`~qwen2vl_trt.runtime.pipeline.Pipeline.from_engine_dir`.
        options: likewise.
        encoders: of :class:`~qwen2vl_trt.serving.encoder.Encoder`; None loads the vision engine here.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        settings: ServerSettings,
        engine_dir: Path,
        device: str,
        options: PipelineOptions,
        encoders: DeploymentHandle | None = None,
    ) -> None:
        engines = open_engines(engine_dir, device)
        vision = None
        if encoders is not None:
            vision = RemoteVision(encoders, await encoders.padded.remote(), engines.device)
        pipeline = Pipeline(engines, options, vision=vision)
        self._service = Service(pipeline, settings.limits.pending)
        self._app = App(settings)
        self._app.open(self._service, pipeline)

    def __del__(self) -> None:
        self._service.close()  # Ray Serve calls this once the requests have ended

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """What the application sends for a request, as it comes; leaving it is the client's hanging up."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return received.pop() if received else await asyncio.Future()

        work = asyncio.ensure_future(self._app(scope, receive, sent.put))
        work.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                messages = [message]
                while not sent.empty() and (message := sent.get_nowait()) is not None:
                    messages.append(message)
                yield messages
                if message is None:
                    break
            work.result()
        finally:
            await cancelled(work)

    async def metrics(self) -> list[Metric]:
        """Those of this replica, which the label ``replica`` names."""
        label = {"replica": serve.get_replica_context().replica_id.unique_id}
        found = await asyncio.to_thread(self._app.metrics.families)
        for family in found:
            family.samples = [sample._replace(labels=sample.labels | label) for sample in family.samples]
        return found

    async def check_health(self) -> None:
        """Raise APIError where no request would be answered; Ray Serve then starts another replica."""
        self._app.check_open()

    async def cancel_all(self) -> None:
        """See :meth:`~qwen2vl_trt.serving.app.App.cancel_all`."""
        self._app.cancel_all()
