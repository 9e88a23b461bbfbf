"""Answers of /v1/completions, in OpenAI's form of texts that are continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from qwen2vl_trt.runtime.detokenizer import Detokenizer
from qwen2vl_trt.runtime.request import Output, TokenLogprobs

from .responses import Completion, end_of, finite


class TextCompletion(Completion):
    """The objects of one request.

    Args:
        model: its served name.
        tokenizer: of the checkpoint.
        starts: what stands before each answer: its prompt with ``echo``, else nothing.
        prompts: number of prompts, whose answers follow one another.
    """

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, starts: Sequence[str], prompts: int) -> None:
        super().__init__(model, tokenizer, prompts)
        self._starts = starts
        self._offsets = [0] * len(starts)  # characters of each answer before its next token
        self._detokenizers = [Detokenizer(tokenizer) for _ in starts]

    def chunk(self, index: int, text: str, logprobs: TokenLogprobs | None, first: bool) -> dict[str, Any]:
        tokens = None if logprobs is None else [logprobs]
        return self._chunk(
            [{"index": index, "text": self._from(index, first) + text, "logprobs": self._logprobs(index, tokens)}]
        )

    def end(self, index: int, output: Output, first: bool, text: str) -> dict[str, Any]:
        return self._chunk(
            [{"index": index, "text": self._from(index, first) + text, "logprobs": None, **end_of(output)}]
        )

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        logprobs = self._logprobs(index, output.logprobs)
        return {"index": index, "text": self._starts[index] + output.text, "logprobs": logprobs, **end_of(output)}

    def _from(self, index: int, first: bool) -> str:
        return self._starts[index] if first else ""

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._detokenizers[index].push(token.token_id))
        told = [(*token.top, (token.token_id, token.logprob)) for token in tokens]
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [{self._name(token_id): finite(logprob) for token_id, logprob in each} for each in told],
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        """A token's text; one that is part of a character is OpenAI's ``bytes:\\xe2``, as names are keys here."""
        data = self._token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
