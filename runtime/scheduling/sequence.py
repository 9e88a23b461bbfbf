"""A request as the scheduler sees it: a prompt to be read, then an answer that grows by one token a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..detokenizer import AnswerStream
from ..request import Output
from ..sampler import SequenceSampling
from .counters import Counters
from .prefix import NO_KEYS, token_keys
from .preparation import Prepared
from .side_stream import Arrival


@dataclass(eq=False)
class RunningSequence:
    """A request that is ready for the decoder.

    Attributes:
        output: where its tokens go.
        inputs_embeds: ``[S, C]`` of the prompt, images in place.
        position_ids: ``[3, S]`` of the prompt.
        delta: position of a generated token minus its index.
        stream: its answer's text and end.
        sampling: its settings and random state.
        keys: what the prompt's tokens are, see :func:`qwen2vl_trt.runtime.scheduling.prefix.token_keys`; empty shares
            nothing.
        prepared: the prompt itself, for an executor that embeds or tokenizes on its own.
        arrival: when ``inputs_embeds`` are there.
        slot: its row of the cache; None before its prompt is begun.
        cached: tokens in its slot so far.
        token: the last token sampled, not yet in the slot; None while the prompt is read.
    """

    output: Output
    inputs_embeds: Tensor
    position_ids: Tensor
    delta: int
    stream: AnswerStream
    sampling: SequenceSampling
    keys: np.ndarray = field(default_factory=lambda: NO_KEYS)
    prepared: Prepared | None = None
    arrival: Arrival = field(default_factory=Arrival)
    slot: int | None = None
    cached: int = 0
    token: int | None = None

    @property
    def prompt_length(self) -> int:
        return self.position_ids.shape[1]

    @property
    def unread(self) -> int:
        """Prompt tokens that are not in the slot yet."""
        return self.prompt_length - self.cached

    def cached_keys(self) -> np.ndarray:
        """Keys of every token in the slot, those of the answer included; empty where ``keys`` is."""
        answered = self.cached - self.prompt_length
        if not len(self.keys) or answered <= 0:
            return self.keys[: self.cached]
        positions = np.arange(self.prompt_length, self.cached) + self.delta
        answer = token_keys(self.stream.token_ids[:answered], np.broadcast_to(positions, (3, answered)))
        return np.concatenate([self.keys, answer])


@dataclass(frozen=True)
class NewToken:
    """A token that a step added to an answer."""

    sequence: RunningSequence = field(repr=False)
    token: int
    text: str


def take_token(sequence: RunningSequence, token: int, counters: Counters) -> NewToken:
    """Add a token to a running answer and count it; the answer may end with it."""
    output = sequence.output
    text = sequence.stream.push(token, "deadline" if output.expired else None)
    sequence.token = token
    output.append(token, text, sequence.stream.finish_reason)
    counters.generated_tokens += 1
    if len(sequence.stream.token_ids) == 1:
        counters.first_tokens += 1
        counters.time_to_first_token_seconds += output.timings.time_to_first_token
    return NewToken(sequence, token, text)
