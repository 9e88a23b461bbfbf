"""In-flight batching: requests join and leave a running batch.

A step runs at most one chunk of one prompt, in that request's own slot, and then one token of every answer that is
under way. So a long prompt never holds up the others for longer than a chunk, and nobody waits for a batch to end.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from .detokenizer import AnswerStream
from .request import Output
from .runners import DecoderRunner
from .sampler import SequenceSampling, sample


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
        cached: tokens in its slot so far.
        token: the last token sampled, not yet in the slot; None while the prompt is read.
    """

    output: Output
    inputs_embeds: Tensor
    position_ids: Tensor
    delta: int
    stream: AnswerStream
    sampling: SequenceSampling
    cached: int = 0
    token: int | None = None

    @property
    def prompt_length(self) -> int:
        return self.position_ids.shape[1]


@dataclass(frozen=True)
class NewToken:
    """A token that a step added to an answer."""

    sequence: RunningSequence
    token: int
    text: str


class Scheduler:
    """Shares a decoder's slots among sequences.

    Args:
        decoder: its slots are this scheduler's alone.
        max_num_tokens: most prompt tokens in one step.
    """

    def __init__(self, decoder: DecoderRunner, max_num_tokens: int) -> None:
        self._decoder = decoder
        self._max_num_tokens = max_num_tokens
        self._slots: list[RunningSequence | None] = [None] * decoder.slots
        self._prompts: deque[RunningSequence] = deque()  # still to be read, first come first served

    @property
    def free_slots(self) -> int:
        return self._slots.count(None)

    @property
    def busy(self) -> bool:
        return any(self._slots)

    def add(self, sequence: RunningSequence) -> None:
        """Give a sequence the first free slot; there must be one."""
        self._slots[self._slots.index(None)] = sequence
        self._prompts.append(sequence)

    def cancel(self, output: Output) -> None:
        """Free the slot of an answer that nobody waits for."""
        self._slots = [None if sequence and sequence.output is output else sequence for sequence in self._slots]
        self._prompts = deque(sequence for sequence in self._prompts if sequence.output is not output)
        self._release()

    def step(self) -> list[NewToken]:
        """One chunk of a prompt, if any waits, and one token of every running answer."""
        new = self._prefill() + self._decode()
        self._slots = [None if s and s.stream.finish_reason else s for s in self._slots]
        self._release()
        return new

    def _release(self) -> None:
        if not self.busy:
            self._decoder.reset()

    def _prefill(self) -> list[NewToken]:
        if not self._prompts:
            return []
        sequence, began = self._prompts[0], time.perf_counter()
        chunk = slice(sequence.cached, min(sequence.cached + self._max_num_tokens, sequence.prompt_length))
        step = self._decoder.step(
            self._slots.index(sequence),
            sequence.inputs_embeds[None, chunk],
            sequence.position_ids[:, None, chunk],
            [sequence.cached],
        )
        sequence.cached = chunk.stop
        whole = sequence.cached == sequence.prompt_length
        tokens = sample(step.logits, [sequence.sampling]) if whole else []
        sequence.output.timings.prefill += time.perf_counter() - began
        if not whole:
            return []
        self._prompts.popleft()
        sequence.inputs_embeds = sequence.inputs_embeds.new_empty(0)  # hundreds of megabytes in a full batch
        return _push([sequence], tokens)

    def _decode(self) -> list[NewToken]:
        running = [i for i, s in enumerate(self._slots) if s and s.token is not None and not s.stream.finish_reason]
        if not running:
            return []
        first, count = running[0], running[-1] - running[0] + 1
        rows = self._slots[first : first + count]
        # A row between two running ones still takes part: what it writes lies beyond its slot's tokens, and its
        # next step overwrites it.
        tokens = [s.token if s and s.token is not None else 0 for s in rows]
        starts = [s.cached if s else 0 for s in rows]
        positions = torch.tensor([s.cached + s.delta if s else 0 for s in rows])
        step = self._decoder.step(
            first, self._decoder.embed(tokens)[:, None], positions.expand(3, -1)[:, :, None], starts
        )
        sequences = [s for i in running if (s := self._slots[i])]
        for sequence in sequences:
            sequence.cached += 1
        logits = step.logits if len(running) == count else step.logits[[i - first for i in running]]
        return _push(sequences, sample(logits, [s.sampling for s in sequences]))


def _push(sequences: list[RunningSequence], tokens: list[int]) -> list[NewToken]:
    new = []
    for sequence, token in zip(sequences, tokens):
        text = sequence.stream.push(token)
        sequence.token = token
        sequence.output.append(token, text, sequence.stream.finish_reason)
        new.append(NewToken(sequence, token, text))
    return new
