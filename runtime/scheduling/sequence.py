"""A request as a scheduler sees it: a prompt to be read, then an answer that grows by one token a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..detokenizer import AnswerStream
from ..preprocessing.sizes import Medium
from ..request import Output
from ..sampling_params import Sampling
from .side_stream import ReadyEvent

NO_KEYS = np.empty((0, 6), np.int64)

_BLOCK = 256  # rows compared at a time: most prompts differ early


@dataclass(eq=False)
class RunningSequence:
    """A request whose prompt is tokenized.

    Attributes:
        output: where its tokens go.
        token_ids: S of the prompt, image and video tokens repeated.
        text: the rendered chat template, one vision token an image or video.
        position_ids: ``[3, S]`` of the prompt.
        delta: position of a generated token minus its index.
        media: the images in the order of their tokens, then the videos; empty once a scheduler has it.
        places: the media's tokens in the prompt, in the order of the media.
        keys: ``[S, 6]``, see :func:`token_keys`; empty shares nothing.
        stream: its answer's text and end.
        sampling: its settings.
        inputs_embeds: ``[S, C]`` of the prompt, media in place; empty until they are embedded.
        ready: passed once ``inputs_embeds`` are there.
        slot: its row of the cache; None before its prompt is begun.
        cached: tokens in its slot so far.
        token: the last token sampled, not yet in the slot; None while the prompt is read.
    """

    output: Output
    token_ids: list[int]
    text: str
    position_ids: Tensor
    delta: int
    media: list[Medium]
    places: np.ndarray
    keys: np.ndarray
    stream: AnswerStream
    sampling: Sampling
    inputs_embeds: Tensor = field(default_factory=lambda: torch.empty(0))
    ready: ReadyEvent = field(default_factory=ReadyEvent)
    slot: int | None = None
    cached: int = 0
    token: int | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.token_ids)

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


def token_keys(
    token_ids: Sequence[int],
    position_ids: np.ndarray,
    media: Sequence[tuple[int, Sequence[bytes], Sequence[int]]] = (),
) -> np.ndarray:
    """What tells each token of a prompt from others: its id, its image or video, and its positions.

    All image tokens have one id, and keys and values in the cache have their rotary positions inside.

    Args:
        token_ids: S of them.
        position_ids: ``[3, S]``, see :func:`qwen2vl_trt.mrope.rope_index`.
        media: of images and of videos: their token id, each one's 16-byte content key
            (:mod:`qwen2vl_trt.runtime.media.cached_media`) and number of tokens, in the order of the prompt.

    Returns:
        ``[S, 6]`` int64: token id, content key in two halves (0 of text), three positions.
    """
    keys = np.zeros((len(token_ids), 6), np.int64)
    keys[:, 0] = token_ids
    keys[:, 3:] = np.asarray(position_ids).T
    for token_id, contents, lengths in media:
        if contents:
            halves = np.frombuffer(b"".join(contents), np.int64).reshape(-1, 2)
            keys[keys[:, 0] == token_id, 1:3] = halves.repeat(lengths, axis=0)
    return keys


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Number of tokens with which both ``[S, 6]`` begin."""
    length = min(len(one), len(other))
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        differs = (one[start:end] != other[start:end]).any(1)
        if differs.any():
            return start + int(differs.argmax())
    return length
