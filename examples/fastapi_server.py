"""A server with FastAPI: answers, streams of tokens, errors, clients that hang up, SIGTERM.

pip install fastapi uvicorn python-multipart
ENGINE_DIR=artifacts/tiny-onnxruntime-fp32 uvicorn examples.fastapi_server:app
curl -F "prompt=What digits are in the image?" -F images=@docs/digits.png localhost:8000/answer
curl -N -F "prompt=What digits are in the image?" -F images=@docs/digits.png localhost:8000/stream
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, Form, UploadFile
from fastapi.requests import Request as HTTPRequest
from fastapi.responses import JSONResponse, StreamingResponse

from qwen2vl_trt import Event, Pipeline, Request, Service
from qwen2vl_trt.errors import DeadlineError, ExecutionError, Qwen2VLError, UnavailableError

STATUS = {UnavailableError: 503, DeadlineError: 504, ExecutionError: 500}  # the others: 400, the request is wrong
DEADLINE = 10.0  # seconds
DRAIN = 30.0  # seconds for the answers under way, once uvicorn has been told to end


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Service(Pipeline.from_engine_dir(os.environ["ENGINE_DIR"])) as app.state.service:
        yield
        await asyncio.to_thread(app.state.service.close, DRAIN)


app = FastAPI(lifespan=lifespan)


@app.exception_handler(Qwen2VLError)
async def failed(request: HTTPRequest, error: Qwen2VLError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, STATUS.get(type(error), 400))


@app.post("/answer")
async def whole(prompt: str = Form(), images: list[UploadFile] = []) -> dict[str, str]:  # noqa: B006
    output = await app.state.service.submit(await _request(prompt, images))
    return {"answer": output.text}  # raises what the request failed with


@app.post("/stream")
async def stream(prompt: str = Form(), images: list[UploadFile] = []) -> StreamingResponse:  # noqa: B006
    """Server-sent events: ``{"text"}`` for each token, and ``{"error"}`` where it fails after the first."""
    events = aiter(app.state.service.submit(await _request(prompt, images)))
    first = await anext(events, None)  # what fails before it is known while there is still a status to send
    return StreamingResponse(_server_sent(first, events), media_type="text/event-stream")


async def _request(prompt: str, images: list[UploadFile]) -> Request:
    # Bytes: a str would be the name of a file of the server's.
    return Request(prompt, [await image.read() for image in images], deadline=DEADLINE)


async def _server_sent(first: Event | None, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async with aclosing(events):  # a client that hangs up ends it here, and with it the request
        try:
            if first is not None:
                yield _event({"text": first.text})
            async for event in events:
                yield _event({"text": event.text})
        except Qwen2VLError as error:
            yield _event({"error": str(error)})


def _event(data: dict[str, str]) -> str:
    return f"data: {json.dumps(data)}\n\n"
