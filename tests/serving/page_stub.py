"""The API that the page talks to, in the server's shapes; the question chooses the answer: ``say X`` is answered X."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qwen2vl_trt.serving.page import page

MODEL = {
    "id": "tiny",
    "max_model_len": 640,
    "min_pixels": 3136,
    "max_pixels": 50176,
    "patch_size": 14,
    "merge_size": 2,
}
LAST = {
    "timings": {"time_to_first_token": 0.042, "decode": 0.1, "total": 0.142},
    "usage": {
        "prompt_tokens": 48,
        "completion_tokens": 6,
        "total_tokens": 54,
        "prompt_tokens_details": {"cached_tokens": 16, "image_tokens": 20},
    },
}
ENDS = {
    "long": {"finish_reason": "length"},
    "late": {"finish_reason": "length", "stop_reason": "cancelled"},
}


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def _event(value: dict) -> str:
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'object': 'chat.completion.chunk'} | value)}\n\n"


def stub(
    bodies: list[dict], keys: list[str | None], sizes: list[tuple[int, int]], wanted_key: str | None = None
) -> Starlette:
    """Appends to ``bodies`` and ``keys`` what each request to chat brings; its images are resized to ``sizes``."""

    async def events(question: str) -> AsyncIterator[str]:
        def delta(text: str | None, **ends: str) -> str:
            return _event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None} | ends]})

        yield ": keep-alive\n\n"
        for letter in question[4:] if question.startswith("say ") else "92059":
            yield delta(letter)
            await asyncio.sleep(0)
        if question == "break":
            yield _event({"error": {"message": "The engine failed.", "type": "server_error"}})
            yield "data: [DONE]\n\n"
            return
        if question == "cut":
            return
        while question == "slow":
            yield delta(" and")
            await asyncio.sleep(0.02)
        yield delta(None, **ENDS.get(question, {"finish_reason": "stop"}))
        yield _event({"choices": [], "images": [{"resized_size": size} for size in sizes], **LAST})
        yield "data: [DONE]\n\n"

    async def chat(request: Request) -> Response:
        body = await request.json()
        bodies.append(body)
        keys.append(request.headers.get("authorization"))
        question = _text(body["messages"][-1])
        if question == "refuse":
            error = {"message": "image 1 is not an image", "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": error}, 400)
        if question == "full":
            return JSONResponse({"error": {"message": "256 requests wait."}}, 503, {"Retry-After": "7"})
        return StreamingResponse(events(question), media_type="text/event-stream")

    async def models(request: Request) -> Response:
        if wanted_key and request.headers.get("authorization") != f"Bearer {wanted_key}":
            return JSONResponse({"error": {"message": "an API key is missing or wrong"}}, 401)
        return JSONResponse({"object": "list", "data": [MODEL]})

    async def index(request: Request) -> Response:
        body, headers = page()
        return Response(body, headers=headers)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )
