"""/v1/completions: prompts of texts and token ids, which are read without the chat template, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from qwen2vl_trt.runtime.detokenizer import Detokenizer
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.request import Output, TokenLogprobs

from .errors import APIError
from .limits import Limits
from .protocol import CompletionRequest, Prompts
from .responses import Completion, end_of, finite


@dataclass(frozen=True)
class PlainPrompt:
    """Token ids, and the text that they were given as, if any."""

    token_ids: list[int]
    text: str | None = None


def check_completion(body: CompletionRequest) -> None:
    """Raise APIError 400 for fields of OpenAI's that have no meaning here."""
    if body.suffix:
        raise APIError(400, "suffix: the model does not insert text; leave it out", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise APIError(400, f"best_of: it must be n, {body.n or 1:,}; every answer is returned", param="best_of")
    if body.echo and body.logprobs is not None:
        message = "logprobs: those of the prompt, which echo asks for, are not computed; leave one of the two out"
        raise APIError(400, message, param="logprobs")


def plain_prompts(given: Prompts, name: str, n: int, pipeline: Pipeline, limits: Limits) -> list[PlainPrompt]:
    """The prompts of a body, tokenized.

    Args:
        given: a text, token ids, or a list of one of them.
        name: its field.
        n: answers to each.
        pipeline: which they are for.
        limits: there may be ``pending`` answers to all of them.

    Raises:
        APIError: 400, texts and token ids mixed, an empty one, or too many.
        PromptError: a text that cannot be tokenized.
        LimitError: one of more characters than the engines' longest prompt stands for.
    """
    kinds = set() if isinstance(given, str) else set(map(type, given))
    if len(kinds) > 1:
        message = f"{name}: it is a text, a list of texts, token ids, or a list of lists of token ids; not of several"
        raise APIError(400, message, param=name)
    prompts: list[Any] = [given] if isinstance(given, str) or kinds == {int} else given
    if len(prompts) * n > limits.pending:
        count = f"{len(prompts):,} prompts" + (f" with n {n:,}" if n > 1 else "")
        raise APIError(400, f"{name}: {count}; this server takes up to {limits.pending:,} answers at once", param=name)
    found = []
    for number, prompt in enumerate(prompts, start=1):
        found.append(PlainPrompt(pipeline.encode(prompt), prompt) if isinstance(prompt, str) else PlainPrompt(prompt))
        if not found[-1].token_ids:
            raise APIError(400, f"{name}: number {number} is empty", param=name)
    return found


def echoes(prompts: Sequence[PlainPrompt], tokenizer: Tokenizer) -> list[str]:
    """The texts of prompts, also of those given as token ids."""
    return [
        tokenizer.decode(prompt.token_ids, skip_special_tokens=False) if prompt.text is None else prompt.text
        for prompt in prompts
    ]


class TextCompletion(Completion):
    """The objects of a request to /v1/completions.

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
