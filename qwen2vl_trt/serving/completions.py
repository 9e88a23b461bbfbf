"""From bodies of texts and token ids, which are read without the chat template, to what the pipeline takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from qwen2vl_trt.runtime.pipeline import Pipeline

from .errors import APIError
from .limits import Limits
from .protocol import CompletionRequest, Prompts


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
