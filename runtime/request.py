"""What goes into the pipeline and what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qwen2vl_trt.errors import PromptError, Qwen2VLError

from .detokenizer import FinishReason
from .images import ImageSource, split_batch
from .sampler import SamplingParams
from .video import VideoSource


@dataclass(frozen=True)
class Request:
    """One prompt with its images and videos.

    Attributes:
        prompt: text, with ``<image>`` and ``<video>`` at their places or without (images first, then videos); or
            messages in OpenAI's or Qwen's form, whose parts may carry the media themselves.
        images: see :func:`runtime.images.load_image` for what is taken.
        videos: see :func:`runtime.video.load_video`.
    """

    prompt: str | Sequence[dict[str, Any]]
    images: Sequence[ImageSource] = ()
    videos: Sequence[VideoSource] = ()

    @classmethod
    def from_batch(cls, images: Tensor, prompts: Sequence[str]) -> list[Request]:
        """Requests of a batch tensor ``(B, n_cameras, 3, H, W)`` with one text a sample.

        Raises:
            PromptError: not one text a sample.
            MediaError: another shape or type.
        """
        samples = split_batch(images)
        if len(samples) != len(prompts):
            raise PromptError(f"{len(samples)} samples of images came with {len(prompts)} prompts; give one a sample")
        return [cls(prompt, sample) for sample, prompt in zip(samples, prompts)]


@dataclass
class Timings:
    """Seconds spent on one request, measured on the host.

    Requests that are prepared together share ``preprocess`` and ``vision``: each reports the whole of it.

    Attributes:
        preprocess: loading, resizing and packing the pixels.
        vision: the vision engine.
        prefill: the decoder over the prompt, all chunks.
        time_to_first_token: from the request's arrival.
        decode: from the first token to the last.
        total: from arrival to the end.
    """

    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    time_to_first_token: float = 0.0
    decode: float = 0.0
    total: float = 0.0


class Output:
    """The answer to one request, filled in as it is generated.

    A request that failed leaves the others alone: its output keeps the exception in ``error``, and reading ``text``
    or ``token_ids`` raises it.
    """

    def __init__(self, on_text: Callable[[str], None] | None = None) -> None:
        self.finish_reason: FinishReason | None = None
        self.error: Qwen2VLError | None = None
        self.timings = Timings()
        self.prompt_tokens = 0
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._on_text = on_text
        self._arrival = time.perf_counter()

    @property
    def text(self) -> str:
        """The answer so far.

        Raises:
            Qwen2VLError: the request failed; the named exception that says why.
        """
        self._raise()
        return "".join(self._text)

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, the end-of-sequence token included; raises as ``text`` does."""
        self._raise()
        return self._token_ids

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def append(self, token: int, text: str, finish_reason: FinishReason | None) -> None:
        """Add a token and the text that it completed."""
        elapsed = time.perf_counter() - self._arrival
        if not self._token_ids:
            self.timings.time_to_first_token = elapsed
        self._token_ids.append(token)
        self._text.append(text)
        self.finish_reason = finish_reason
        self.timings.total = elapsed
        self.timings.decode = elapsed - self.timings.time_to_first_token
        if text and self._on_text is not None:
            self._on_text(text)

    def fail(self, error: Qwen2VLError) -> None:
        """End the request with an error."""
        self.error = error
        self.timings.total = time.perf_counter() - self._arrival

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Event:
    """One token of one answer: its request's number in the call, the text that it completed, and the answer."""

    index: int
    token_id: int
    text: str
    output: Output = field(repr=False)


__all__ = ["Event", "Output", "Request", "SamplingParams", "Timings"]
