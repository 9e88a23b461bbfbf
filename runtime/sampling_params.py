"""Sampling settings of a request. Imports no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.messages import LONE_SURROGATE

from .structured_outputs import StructuredOutputsParams

_GREEDY_TEMPERATURE = 1e-5  # as in vLLM

PENALTIES = (1e-4, 1e4)
"""Minimum and maximum of ``repetition_penalty``; beyond, logits overflow."""

_LARGEST_PENALTY = 2  # of presence and frequency, as in OpenAI's and vLLM's interfaces
_LARGEST_BIAS = 100  # likewise


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of a request.

    None takes the value of the checkpoint's ``generation_config.json``, or without one the default in brackets.

    Attributes:
        max_tokens: most tokens of the answer, at least 1 [256, or what the prompt leaves].
        temperature: divides the logits; up to 1e-5 is greedy [0].
        top_p: keep the likeliest tokens that together reach this probability; in (0, 1] [1, all].
        top_k: keep this many of the likeliest tokens [0, all].
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely [1, off].
        seed: of the random draws, 0 to 2**63 - 1; None takes a fresh one.
        stop: a string, or strings, that end the answer and are not part of it [none].
        ignore_eos: go on after an end-of-sequence token (for timing).
        min_p: keep the tokens with at least this share of the likeliest one's probability; in [0, 1] [0, all].
        presence_penalty: subtracted from the logits of tokens that the answer has; -2 to 2 [0, off].
        frequency_penalty: likewise, times how often it has them; -2 to 2 [0, off].
        stop_token_ids: tokens that end the answer as end-of-sequence tokens do, with ``ignore_eos`` too; ``token_ids``
            has the token, the text has not [none].
        logit_bias: added to the logits of these token ids, before the penalties; -100 to 100 [none].
        logprobs: log-probabilities of each token of the answer, in ``Output.logprobs``: 0 of that token alone, N of
            the N likeliest too. They are the model's own, before bias, penalties, temperature and the rest [none].
        structured_outputs: what the answer must look like [any text].

    Raises:
        SamplingError: a value is out of range, or ``ignore_eos`` with ``structured_outputs``, which end the answer.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool = False
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop_token_ids: tuple[int, ...] | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, (valid, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if not valid(value) and (value is not None or name == "ignore_eos"):
                raise SamplingError(f"{name} is {value!r}; it must be {allowed}")
        if self.stop is not None:
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))
        if self.logit_bias is not None:
            bias = {int(token): float(value) for token, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        if self.ignore_eos and self.structured_outputs is not None:
            raise SamplingError(
                "ignore_eos goes on after the end that structured_outputs lead to; leave one of the two out"
            )

    def with_defaults(self, defaults: SamplingParams | None = None) -> Sampling:
        """Replace None by the value in ``defaults``, else by the default in brackets."""
        values = {
            name: value
            for source in (defaults, self)
            if source is not None
            for name, value in vars(source).items()
            if value is not None
        }
        return Sampling(**values, max_tokens_given=self.max_tokens is not None)


@dataclass(frozen=True)
class Sampling:
    """:class:`SamplingParams` without None.

    Attributes:
        max_tokens_given: by the request; otherwise ``max_tokens`` may be lowered to what the prompt leaves.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    max_tokens_given: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature <= _GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, size: int) -> None:
        """Raise SamplingError for a token id that a vocabulary of this size does not have."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            if max(ids, default=0) >= size:
                raise SamplingError(f"{name} has token {max(ids)}; the model's vocabulary has 0 to {size - 1:,}")


def _is_number(value: Any, low: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= low


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _are_texts(value: Any) -> bool:
    texts = (value,) if isinstance(value, str) else value
    return isinstance(texts, Sequence) and all(
        isinstance(text, str) and text and not LONE_SURROGATE.search(text) for text in texts
    )


def _are_biases(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_int(token, 0) and _is_number(bias, -_LARGEST_BIAS) and bias <= _LARGEST_BIAS
        for token, bias in value.items()
    )


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda value: _is_int(value, 1), "a whole number of at least 1"),
    "temperature": (lambda value: _is_number(value, 0), "a finite number of at least 0"),
    "top_p": (
        lambda value: _is_number(value, 0) and 0 < value <= 1,
        "a number above 0 and up to 1 (1 keeps all tokens)",
    ),
    "top_k": (lambda value: _is_int(value, 0), "a whole number of at least 0 (0 keeps all tokens)"),
    "repetition_penalty": (
        lambda value: _is_number(value, PENALTIES[0]) and value <= PENALTIES[1],
        f"a number from {PENALTIES[0]:g} to {PENALTIES[1]:g} (1 is off)",
    ),
    "seed": (lambda value: _is_int(value, 0) and value < 2**63, "None or a whole number from 0 to 2**63 - 1"),
    "stop": (_are_texts, "strings that are not empty and have no lone surrogate"),
    "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
    "min_p": (lambda value: _is_number(value, 0) and value <= 1, "a number from 0 to 1 (0 keeps all tokens)"),
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty"),
        (
            lambda value: _is_number(value, -_LARGEST_PENALTY) and value <= _LARGEST_PENALTY,
            f"a number from -{_LARGEST_PENALTY} to {_LARGEST_PENALTY} (0 is off)",
        ),
    ),
    "stop_token_ids": (
        lambda value: isinstance(value, Sequence) and all(_is_int(token, 0) for token in value),
        "a list of token ids",
    ),
    "logit_bias": (_are_biases, f"a mapping of token ids to numbers from -{_LARGEST_BIAS} to {_LARGEST_BIAS}"),
    "logprobs": (lambda value: _is_int(value, 0), "None or a whole number of at least 0"),
    "structured_outputs": (
        lambda value: isinstance(value, StructuredOutputsParams),
        "StructuredOutputsParams(json=...), from qwen2vl_trt",
    ),
}
