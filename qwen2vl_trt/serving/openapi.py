"""The OpenAPI document of the server, from the structs that read its bodies."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from qwen2vl_trt import __version__

from .message_schema import SCHEMAS
from .protocol import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, GenerationRequest, TokenizeRequest

_ERRORS = {
    400: "a field is wrong, or a medium cannot be decoded",
    401: "an API key is missing or wrong",
    404: "no such model",
    408: "the body took too long",
    413: "the body, an image or a video is too large",
    415: "not application/json",
    422: "a URL that is allowed cannot be fetched",
    500: "the server failed",
    501: "the backend gives no hidden states",
    503: "too many requests, loading, or stopping; see Retry-After",
    504: "the request's timeout passed before its first token",
}
_GET = {
    "/": ("the page", "text/html"),
    "/health": ("the process is alive", "application/json"),
    "/ready": ("the model is loaded and requests are taken", "application/json"),
    "/metrics": ("Prometheus metrics", "text/plain"),
    "/version": ("of the server", "application/json"),
    "/openapi.json": ("this document", "application/json"),
    "/v1/models": ("the model, with its limits", "application/json"),
    "/v1/models/{model}": ("the model by its name", "application/json"),
}
_POST = {
    "/v1/chat/completions": ("an answer, or with stream a stream of chunks", ChatCompletionRequest),
    "/v1/completions": ("the continuation of texts, or with stream a stream of chunks", CompletionRequest),
    "/v1/embeddings": ("pooled hidden states of texts and messages, or pooled features of images", EmbeddingRequest),
    "/tokenize": ("the tokens of a text, or of a conversation, images included", TokenizeRequest),
}


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """OpenAPI 3.1, as an object of JSON."""
    kinds = [kind for _, kind in _POST.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components |= SCHEMAS
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    errors = {
        str(status): {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in _ERRORS.items()
    }
    paths: dict[str, Any] = {
        path: {"get": {"summary": text, "responses": {"200": _content(text, kind), **errors}}}
        for path, (text, kind) in _GET.items()
    }
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    for (path, (text, kind)), schema in zip(_POST.items(), schemas, strict=True):
        done = _content(text, "application/json")
        if issubclass(kind, GenerationRequest):
            done["content"]["text/event-stream"] = {}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"summary": text, "requestBody": body, "responses": {"200": done, **errors}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qwen2vl-trt", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _content(text: str, kind: str) -> dict[str, Any]:
    return {"description": text, "content": {kind: {}}}
