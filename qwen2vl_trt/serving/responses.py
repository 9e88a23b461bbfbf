"""Answers in OpenAI's form, whole and as chunks of a stream, with the sizes of media and timings beside."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any, ClassVar

from tokenizers import Tokenizer

from qwen2vl_trt.runtime.request import Output, TokenLogprobs

TokenBytes = Callable[[int], bytes]
"""The bytes that a token stands for."""


class Completion:
    """The objects of one request.

    Args:
        model: its served name.
        tokenizer: of the checkpoint, for log-probabilities.
        prompts: number of prompts, whose answers follow one another.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer, prompts: int = 1) -> None:
        self._token_bytes, self._prompts = token_bytes_of(tokenizer), prompts
        self._common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The answer of a request without a stream."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return {**self._common, "object": self.kind, "choices": choices, **account(outputs, self._prompts)}

    def chunk(self, index: int, text: str, logprobs: TokenLogprobs | None, first: bool) -> dict[str, Any] | None:
        """A token of a stream; None where there is nothing to say of it yet."""
        raise NotImplementedError

    def end(self, index: int, output: Output, first: bool, text: str) -> dict[str, Any]:
        """The end of an answer, and text that came with no token; one that has no token at all begins here too."""
        raise NotImplementedError

    def usage(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The last chunk, where ``stream_options.include_usage`` asks for it."""
        return self._chunk([]) | account(outputs, self._prompts)

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        for choice in choices:
            choice.setdefault("finish_reason", None)
        return {**self._common, "object": self.chunk_kind, "choices": choices}


class ChatCompletion(Completion):
    """The objects of a request to /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def chunk(self, index: int, text: str, logprobs: TokenLogprobs | None, first: bool) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return self._chunk(
            [{"index": index, "delta": delta, "logprobs": self._logprobs(None if logprobs is None else [logprobs])}]
        )

    def end(self, index: int, output: Output, first: bool, text: str) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if first or text else {})
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, **end_of(output)}])

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text}
        return {"index": index, "message": message, "logprobs": self._logprobs(output.logprobs), **end_of(output)}

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
        return {"token": data.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float) -> float:
    """JSON has no infinity, which a token of probability 0 has; vLLM writes the same number."""
    return max(logprob, -9999.0)


def tokens_used(prompt: int, completion: int) -> dict[str, Any]:
    """OpenAI's ``usage``."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def account(outputs: Sequence[Output], prompts: int = 1) -> dict[str, Any]:
    """Tokens used by the answers to so many prompts, the sizes of the first's media, and the first answer's seconds."""
    first, answered = outputs[0], outputs[:: len(outputs) // prompts]
    prompt = sum(output.prompt_tokens for output in answered)
    completion = sum(len(output.token_ids) for output in outputs)
    details = {
        "cached_tokens": sum(output.reused_tokens for output in answered),
        "image_tokens": sum(medium.tokens for medium in [*first.images, *first.videos]),
    }
    return {
        "usage": tokens_used(prompt, completion) | {"prompt_tokens_details": details},
        "images": [image.as_json() for image in first.images],
        "videos": [video.as_json() for video in first.videos],
        "timings": asdict(first.timings),
    }


def end_of(output: Output) -> dict[str, str]:
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
    """GPT-2's: what Latin-1 can print stands for itself, the other bytes for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
