"""Answers in OpenAI's form, whole and as chunks of a stream, with the sizes of media and timings beside."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen2vl_trt.runtime.request import Output, TokenLogprobs

TokenBytes = Callable[[int], bytes]
"""The bytes that a token stands for."""


class ChatCompletion:
    """The objects of one request.

    Args:
        model: its served name.
        token_bytes: for log-probabilities.
    """

    def __init__(self, model: str, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The answer of a request without a stream."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": output.text},
                "logprobs": self._logprobs(output.logprobs),
                **_end(output),
            }
            for index, output in enumerate(outputs)
        ]
        return {**self._common, "object": "chat.completion", "choices": choices, **account(outputs)}

    def chunk(self, index: int, text: str, logprobs: TokenLogprobs | None, first: bool) -> dict[str, Any]:
        """A token of a stream."""
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return self._chunk(
            [{"index": index, "delta": delta, "logprobs": self._logprobs(None if logprobs is None else [logprobs])}]
        )

    def end(self, index: int, output: Output, first: bool, text: str) -> dict[str, Any]:
        """The end of an answer, and text that came with no token; one that has no token at all begins here too."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if first or text else {})
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, **_end(output)}])

    def usage(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The last chunk, where ``stream_options.include_usage`` asks for it."""
        return self._chunk([]) | account(outputs)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        for choice in choices:
            choice.setdefault("finish_reason", None)
        return {**self._common, "object": "chat.completion.chunk", "choices": choices}

    def _logprobs(self, tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "content": [
                {
                    **self._token(token.token_id, token.logprob),
                    "top_logprobs": [self._token(*each) for each in token.top],
                }
                for token in tokens
            ]
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes(token_id)
        # JSON has no infinity, which a token of probability 0 has; vLLM writes the same number.
        return {"token": data.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def account(outputs: Sequence[Output]) -> dict[str, Any]:
    """Tokens used by the answers to one prompt, the sizes of its media, and the seconds of the first answer."""
    first = outputs[0]
    completion = sum(len(output.token_ids) for output in outputs)
    details = {
        "cached_tokens": first.reused_tokens,
        "image_tokens": sum(medium.tokens for medium in [*first.images, *first.videos]),
    }
    return {
        "usage": {
            "prompt_tokens": first.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": first.prompt_tokens + completion,
            "prompt_tokens_details": details,
        },
        "images": [image.as_json() for image in first.images],
        "videos": [video.as_json() for video in first.videos],
        "timings": asdict(first.timings),
    }


def _end(output: Output) -> dict[str, str]:
    """OpenAI has no reason for a deadline: the answer is cut short, and ``stop_reason`` says by what."""
    if output.finish_reason == "stop":
        return {"finish_reason": "stop"}
    ends = {"finish_reason": "length"}
    return ends if output.finish_reason == "length" else ends | {"stop_reason": str(output.finish_reason)}


def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    """Bytes of a token: byte-level tokenizers, as all of Qwen are, write each byte as a letter."""
    letters = _byte_letters()

    def token_bytes(token_id: int) -> bytes:
        token = tokenizer.id_to_token(token_id) or ""
        return bytes(map(letters.__getitem__, token)) if letters.keys() >= set(token) else token.encode()

    return token_bytes


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
