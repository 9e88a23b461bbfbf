"""How an answer is generated: what a request says, and what is decided. Imports no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.messages import LONE_SURROGATE

_GREEDY_TEMPERATURE = 1e-5  # vLLM's bound: below it the likeliest token is all but certain
PENALTIES = (1e-4, 1e4)
"""Least and most of ``repetition_penalty``: beyond, a logit overflows and no token is likelier than another."""


@dataclass(frozen=True)
class SamplingParams:
    """What a request says about how its answer is generated.

    None means what the checkpoint's ``generation_config.json`` says, and where it says nothing, the neutral value in
    brackets.

    Attributes:
        max_tokens: most tokens of the answer, at least 1 [256, or what the prompt leaves].
        temperature: up to 1e-5 takes the likeliest token (greedy); above, logits are divided by it [0].
        top_p: keep the likeliest tokens that together reach this probability; in (0, 1], 1 keeps all [1].
        top_k: keep that many of the likeliest tokens; 0 keeps all [0].
        repetition_penalty: above 1 makes tokens of the prompt and of the answer so far less likely; 1 is off [1].
        seed: of the random draws, 0 to 2**63 - 1; None takes a fresh one.
        stop: strings that end the answer and are not part of it. One string is a sequence of one [none].
        ignore_eos: go on after an end-of-sequence token (for timing).

    Raises:
        SamplingError: a value has no meaning; the message names the setting, the value and the range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check("max_tokens", lambda value: _is_int(value, 1), "a whole number of at least 1")
        self._check("temperature", lambda value: _is_number(value, 0), "a finite number of at least 0")
        self._check(
            "top_p",
            lambda value: _is_number(value, 0) and 0 < value <= 1,
            "a number above 0 and up to 1 (1 keeps all tokens)",
        )
        self._check("top_k", lambda value: _is_int(value, 0), "a whole number of at least 0 (0 keeps all tokens)")
        self._check(
            "repetition_penalty",
            lambda value: _is_number(value, PENALTIES[0]) and value <= PENALTIES[1],
            f"a number from {PENALTIES[0]:g} to {PENALTIES[1]:g} (1 is off)",
        )
        self._check(
            "seed", lambda value: _is_int(value, 0) and value < 2**63, "None or a whole number from 0 to 2**63 - 1"
        )
        self._check("stop", _are_texts, "strings that are not empty and have no lone surrogate")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False")
        if self.stop is not None:  # lists and single strings are welcome, a frozen fact is kept
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    def _check(self, name: str, valid: Callable[[Any], bool], allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not valid(value):
            raise SamplingError(f"{name} is {value!r}; it must be {allowed}")

    def with_defaults(self, defaults: SamplingParams | None = None) -> Sampling:
        """Every setting decided: what is None here is the default's, and what is None there the neutral value."""
        decided: dict[str, Any] = {"max_tokens_given": self.max_tokens is not None}
        for source in (self, defaults):
            for field in fields(SamplingParams) if source is not None else ():
                value = getattr(source, field.name)
                if value is not None:
                    decided.setdefault(field.name, value)
        return Sampling(**decided)


@dataclass(frozen=True)
class Sampling:
    """How one answer is generated, every setting decided; see :class:`SamplingParams`.

    Attributes:
        max_tokens_given: the request itself says ``max_tokens``; else it is lowered to what the prompt leaves.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_tokens_given: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature <= _GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1


def _is_number(value: Any, low: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= low


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _are_texts(value: Any) -> bool:
    texts = (value,) if isinstance(value, str) else value
    return isinstance(texts, Sequence) and all(
        isinstance(text, str) and text and not LONE_SURROGATE.search(text) for text in texts
    )
