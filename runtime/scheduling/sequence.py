"""A request as a scheduler sees it: a prompt to be read, then an answer that grows by one token a step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..detokenizer import AnswerStream
from ..preprocessing.sizes import Medium
from ..request import Features, Output
from ..sampling_params import Sampling
from ..structured_outputs import Matcher
from .side_stream import ReadyEvent


@dataclass(eq=False)
class RunningSequence:
    """A request whose prompt is tokenized.

    Attributes:
        output: where its tokens go.
        token_ids: S to be read before the next one is sampled: the prompt, image and video tokens repeated, and after
            a preemption the answer so far.
        text: the rendered chat template, one vision token an image or video.
        position_ids: ``[3, S]``, on the host.
        delta: position of a generated token minus its index.
        media: the images in the order of their tokens, then the videos; empty once a scheduler has it.
        places: the media's tokens in the prompt, in the order of the media.
        keys: ``[S, 6]``, see :func:`token_keys`.
        stream: its answer's text and end.
        params: its settings.
        inputs_embeds: ``[S, C]``, media in place; empty until they are embedded.
        ready: passed once ``inputs_embeds`` are there.
        hashes: of its whole blocks, see :func:`block_hashes`; empty shares nothing.
        slot: its place in the key-value cache, which may change; None before its prompt is begun.
        index: its place in the sampler, as long as it has a slot.
        cached: tokens in its slot so far.
        sampled: tokens of its answer that are sampled, or are being.
        matcher: its place in the grammar that its answer follows; None where it is free.
        counts: its prompt is counted and timed; no longer once it was preempted.
        features: what is asked for in place of an answer.
        adapter: that the decoder reads and answers with.
        found: these features, on the device.
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
    params: Sampling
    inputs_embeds: Tensor = field(default_factory=lambda: torch.empty(0))
    ready: ReadyEvent = field(default_factory=ReadyEvent)
    hashes: list[bytes] = field(default_factory=list)
    slot: int | None = None
    index: int = 0
    cached: int = 0
    sampled: int = 0
    matcher: Matcher | None = None
    counts: bool = True
    features: Features | None = None
    adapter: str | None = None
    found: list[Tensor] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return self.output.prompt_tokens

    @property
    def unread(self) -> int:
        """Tokens to be read that are not in the slot yet; 0 once the answer grows."""
        return max(0, len(self.token_ids) - self.cached)

    @property
    def reading(self) -> bool:
        """Whether there are any."""
        return self.cached < len(self.token_ids)

    def finish(self) -> None:
        """End it with the features that it has; the host waits for them."""
        self.output.finish([each.to("cpu", torch.float32, copy=True) for each in self.found])

    def known_keys(self) -> np.ndarray:
        """Keys of every token in the slot that the host knows, those of the answer included."""
        first = len(self.token_ids)
        answer = self.stream.token_ids[first - self.prompt_length : self.cached - self.prompt_length]
        if not answer or self.cached <= first:
            return self.keys[: self.cached]
        return np.concatenate([self.keys, self._answer_keys(answer)])

    def restart(self, embeds: Tensor) -> None:
        """Read prompt and answer again, from nothing; ``embeds [n, C]`` are of the answer's tokens to be added."""
        answer = self.stream.token_ids[len(self.token_ids) - self.prompt_length :]
        self.keys = np.concatenate([self.keys, self._answer_keys(answer)])
        self.token_ids = [*self.token_ids, *answer]
        self.position_ids = torch.from_numpy(self.keys[:, 3:].T.copy())
        self.inputs_embeds = torch.cat([self.inputs_embeds, embeds])
        self.cached = 0

    def _answer_keys(self, answer: Sequence[int]) -> np.ndarray:
        """Of tokens of the answer that follow ``token_ids``."""
        positions = np.arange(len(answer)) + len(self.token_ids) + self.delta
        return token_keys(answer, np.broadcast_to(positions, (3, len(answer))))


def token_keys(
    token_ids: Sequence[int],
    position_ids: np.ndarray,
    media: Sequence[tuple[int, Sequence[bytes], Sequence[int]]] = (),
    salt: str | None = None,
) -> np.ndarray:
    """What tells each token of a prompt from others: its id, its image or video, and its positions.

    All image tokens have one id, and keys and values in the cache have their rotary positions inside.

    Args:
        token_ids: S of them.
        position_ids: ``[3, S]``, see :func:`qwen2vl_trt.mrope.rope_index`.
        media: of images and of videos: their token id, each one's 16-byte content key
            (:mod:`qwen2vl_trt.runtime.media.cached_media`) and number of tokens, in the order of the prompt.
        salt: ``Request.cache_salt``, and with an adapter its name; it is in the first token's key, and so in the hash
            of every block.

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
    if salt is not None:
        keys[:1, 1:3] ^= np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=16).digest(), np.int64)
    return keys


def block_hashes(keys: np.ndarray, size: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """Names of the whole blocks of ``size`` tokens in keys ``[S, 6]``: each of its tokens and all before them.

    As in vLLM (https://docs.vllm.ai/en/stable/design/prefix_caching.html): equal hashes are equal prefixes.

    Args:
        keys: see :func:`token_keys`.
        size: tokens of a block.
        before: the hashes of the first blocks, if known.
    """
    hashes = list(before[: len(keys) // size])
    for start in range(len(hashes) * size, len(keys) - size + 1, size):
        block = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=16)
        block.update(np.ascontiguousarray(keys[start : start + size]).data)
        hashes.append(block.digest())
    return hashes
