"""Embeddings in OpenAI's form: what the model has anyway, pooled; it is not trained for retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pybase64
from torch import Tensor
from torch.nn.functional import normalize

from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.runtime.backends.runners import Engines
from qwen2vl_trt.runtime.request import Output, Request

from .errors import APIError, overloaded
from .protocol import EmbeddingRequest


def check_embedding(body: EmbeddingRequest, engines: Engines) -> None:
    """See that a body asks for what there is.

    Raises:
        APIError: 400, fields that contradict each other, or dimensions that are not the width; 501, the backend gives
            no hidden states.
    """
    if (body.input is None) == (body.messages is None):
        raise APIError(400, "input: give either input or messages", param="input")
    if body.pooling == "image_features" and body.messages is None:
        raise APIError(400, "pooling: image_features are of images; give them in messages", param="pooling")
    width = engines.checkpoint.config.text.hidden_size
    if body.dimensions not in (None, width):
        message = f"dimensions: this model's embeddings have {width:,}, and are not made shorter"
        raise APIError(400, message, param="dimensions")
    if body.pooling == "last_hidden_state":
        try:
            _ = engines.decoder
        except EngineError:
            message = "pooling: the backend of this model gives no hidden states; image_features are all that it has"
            raise APIError(501, message, param="pooling", code="not_supported") from None


def check_alone(body: EmbeddingRequest, request: Request) -> None:
    """Raise APIError 400 for texts beside images whose features are asked for: they would be passed over."""
    contents = [message.get("content") for message in request.prompt if isinstance(message, dict)]
    alone = all(
        isinstance(content, list) and all(part.get("type") in ("image", "video") for part in content)
        for content in contents
    )
    if body.pooling == "image_features" and not alone:
        raise APIError(400, "messages: image_features read no text; leave the texts out", param="messages")


def embeddings(body: EmbeddingRequest, model: str, outputs: Sequence[Output]) -> dict[str, Any]:
    """The answer; raises APIError 503 where the server has stopped one of them."""
    if any(output.finish_reason == "cancelled" for output in outputs):
        raise overloaded("the server is stopping")
    vectors = [normalize(_pooled(each), dim=0) for output in outputs for each in output.features]
    if body.pooling == "image_features":
        tokens = sum(medium.tokens for output in outputs for medium in [*output.images, *output.videos])
    else:
        tokens = sum(output.prompt_tokens for output in outputs)
    encode = _base64 if body.encoding_format == "base64" else Tensor.tolist
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "images": [image.as_json() for output in outputs for image in output.images],
        "videos": [video.as_json() for output in outputs for video in output.videos],
    }


def _pooled(features: Tensor) -> Tensor:
    """``[C]``: a last hidden state as it is, the mean of an image's ``[tokens, C]``."""
    return features if features.ndim == 1 else features.mean(dim=0)


def _base64(vector: Tensor) -> str:
    return pybase64.b64encode_as_string(vector.numpy().astype("<f4").tobytes())
