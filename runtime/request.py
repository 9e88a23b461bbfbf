"""What goes into the pipeline and what comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from reprlib import Repr
from typing import Any, Literal, get_args

from torch import Tensor

from qwen2vl_trt.errors import DeadlineError, PromptError, Qwen2VLError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions

from .detokenizer import FinishReason
from .inputs.images import ImageSource, split_batch
from .inputs.video import VideoSource
from .preprocessing.sizes import MediaSize
from .sampling_params import SamplingParams

Features = Literal["last_hidden_state", "image_features"]
"""The decoder's state of a prompt's last token, or what the vision engine gives of its images and videos."""


class _Short(Repr):
    """``reprlib``'s, with longer strings, arrays and tensors by their shape, bytes by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr1(self, value: Any, level: int) -> str:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"<{type(value).__name__} {tuple(value.shape)} {value.dtype}>"
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{len(value):,} bytes>"
        if is_dataclass(value):
            given = ((each.name, getattr(value, each.name), each.default) for each in fields(value))
            shown = (f"{name}={self.repr1(each, level - 1)}" for name, each, default in given if each is not default)
            return f"{type(value).__name__}({', '.join(shown)})"
        return super().repr1(value, level)


_SHORT = _Short()


@dataclass(frozen=True, repr=False)
class Request:
    """One prompt with its images and videos.

    Attributes:
        prompt: text, with ``<image>`` and ``<video>`` at their places or without (images first, then videos);
            messages in OpenAI's or Qwen's form, whose parts may carry the media themselves; or token ids, which the
            decoder reads as they are, without the chat template and without media.
        images: see :func:`qwen2vl_trt.runtime.inputs.images.load_image` for what is taken.
        videos: see :func:`qwen2vl_trt.runtime.inputs.video.load_video`.
        deadline: seconds from its submission after which the answer is no longer wanted. One that has begun then ends
            with the token it has just got and ``finish_reason`` ``"deadline"``; one that has no token yet fails with
            DeadlineError.
        image_options: of every image whose part of a message does not say otherwise.
        video_options: of every video, likewise; which frames are kept, of files alone, and ``sample_fps`` of frames in
            memory alone. A :class:`~qwen2vl_trt.runtime.inputs.video.Video` keeps its own rate.
        cache_salt: prefixes and embeddings are shared only between requests of equal salts, as in vLLM: a server that
            gives each client its own lets none learn from the time to the first token what others have sent.
        tools: OpenAI's, ``{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}``, for
            a chat template that writes them.
        adapter: one of ``PipelineOptions.lora_modules``, by name; None is the model as it is.
        features: what is asked for in place of an answer; it comes in ``Output.features``, beside running answers.

    Raises:
        PromptError: options that are no :class:`~qwen2vl_trt.media_options.ImageOptions` or ``VideoOptions``, or
            features that there are not.
        DeadlineError: ``deadline`` is no finite number above 0.
    """

    prompt: str | Sequence[dict[str, Any]] | Sequence[int]
    images: Sequence[ImageSource] = ()
    videos: Sequence[VideoSource] = ()
    deadline: float | None = None
    image_options: ImageOptions = ImageOptions()
    video_options: VideoOptions = VideoOptions()
    cache_salt: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    features: Features | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.features is not None and self.features not in get_args(Features):
            raise PromptError(f"features is {self.features!r}; known are {', '.join(get_args(Features))}")
        for name, kind in (("image_options", ImageOptions), ("video_options", VideoOptions)):
            given = getattr(self, name)
            if type(given) is not kind:  # VideoOptions are ImageOptions too
                raise PromptError(
                    f"{name} is of type {type(given).__name__}; give {kind.__name__}(max_pixels=...), from qwen2vl_trt"
                )
        seconds = self.deadline
        if seconds is None:
            return
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise DeadlineError(f"deadline is {seconds!r}; it must be a number of seconds above 0, or None")

    def __repr__(self) -> str:
        return _SHORT.repr(self)

    @classmethod
    def from_batch(cls, images: Tensor, prompts: Sequence[str]) -> list[Request]:
        """Requests of a batch tensor ``(B, n_cameras, 3, H, W)`` with one text a sample.

        Raises:
            PromptError: not one text a sample, or a lone string, which is none for its letters.
            MediaError: another shape or type.
        """
        if isinstance(prompts, str):
            raise PromptError("prompts is a string, not a list; give prompts=[...] even for one")
        samples = split_batch(images)
        if len(samples) != len(prompts):
            raise PromptError(f"{len(samples)} samples of images came with {len(prompts)} prompts; give one a sample")
        return [cls(prompt, sample) for sample, prompt in zip(samples, prompts)]


@dataclass
class Timings:
    """Seconds spent on one request, measured on the host.

    Requests that are prepared together share ``preprocess`` and ``vision``: each reports the whole of it.

    Attributes:
        queue: from the request's arrival to the first chunk of its prompt, less ``preprocess`` and ``vision``.
        preprocess: loading, resizing and packing the pixels.
        load: of it, reading and decoding the images and videos.
        vision: the vision engine.
        prefill: from the first chunk of the prompt to the first token.
        time_to_first_token: from the request's arrival.
        decode: from the first token to the last.
        total: from arrival to the end.
    """

    queue: float = 0.0
    preprocess: float = 0.0
    load: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    time_to_first_token: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities where one token of an answer was chosen, as ``SamplingParams.logprobs`` asks for them.

    Attributes:
        token_id: the token of the answer.
        logprob: its own.
        top: the likeliest tokens there, likeliest first, each with its own.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output:
    """The answer to one request, filled in as it is generated.

    A request that failed leaves the others alone: its output keeps the exception in ``error``, and reading ``text``
    or ``token_ids`` raises it.

    Args:
        deadline: seconds from now, see :class:`Request`.
        clock: seconds, as :func:`time.perf_counter` has them.
        on_end: called once, when nothing more will come.

    Attributes:
        finish_reason: ``"stop"``, ``"length"``, ``"deadline"``, ``"cancelled"``, or None while it runs and where it
            failed.
        error: why it failed.
        prompt_tokens: length of the prompt, images included.
        reused_tokens: how many of them were in the cache from another request.
        images: what became of each image, in the order of the prompt, once the request is prepared.
        videos: likewise of each video.
        logprobs: of each of ``token_ids``; None where they were not asked for.
        features: FP32 on the host, once it has ended: ``[C]`` after the decoder's final norm for ``last_hidden_state``;
            ``[tokens, C]`` of each image and then of each video for ``image_features``.
        timings: see :class:`Timings`.
        arrival: when it was made, by the clock.
        expires: the clock's time at which its deadline passes; infinity where it has none.
    """

    def __init__(
        self,
        deadline: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_end: Callable[[Output], None] | None = None,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.error: Qwen2VLError | None = None
        self.timings = Timings()
        self.prompt_tokens = self.reused_tokens = 0
        self.images: list[MediaSize] = []
        self.videos: list[MediaSize] = []
        self.logprobs: list[TokenLogprobs] | None = None
        self.features: list[Tensor] = []
        self.clock = clock
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._on_end = on_end
        self.arrival = self._started = clock()
        self._deadline = deadline
        self.expires = math.inf if deadline is None else self.arrival + deadline

    def __repr__(self) -> str:
        state = f"error={self.error!r}" if self.error is not None else f"finish_reason={self.finish_reason!r}"
        return (
            f"Output(text={_SHORT.repr(''.join(self._text))}, tokens={len(self._token_ids)}, {state},"
            f" prompt_tokens={self.prompt_tokens}, images={len(self.images)}, videos={len(self.videos)})"
        )

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

    @property
    def expired(self) -> bool:
        """Whether its deadline has passed."""
        return self._deadline is not None and self.clock() >= self.expires

    def start(self) -> None:
        """Note that the decoder begins with its prompt."""
        self._started = self.clock()
        waited = self._started - self.arrival - self.timings.preprocess - self.timings.vision
        self.timings.queue = max(0.0, waited)  # a difference of sums may round to less

    def append(
        self,
        token: int,
        text: str,
        finish_reason: FinishReason | None,
        now: float,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Add a token and the text that it completed, ``now`` by the clock; one that has ended gets no more."""
        if self.finish_reason is not None or self.error is not None:
            return
        elapsed, timings = now - self.arrival, self.timings
        if not self._token_ids:
            timings.time_to_first_token = elapsed
            timings.prefill = elapsed - (self._started - self.arrival)
        self._token_ids.append(token)
        self._text.append(text)
        if logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.append(logprobs)
        timings.decode = elapsed - timings.time_to_first_token
        if finish_reason is not None:
            self._end(finish_reason, None)

    def finish(self, features: list[Tensor]) -> None:
        """End a request for features with them."""
        if not self.finished:
            self.features = features
        self._end("stop", None)

    def fail(self, error: Qwen2VLError) -> None:
        """End the request with an error."""
        self._end(None, error)

    def cancel(self) -> None:
        """End the request as it is; nothing happens to one that has ended."""
        self._end("cancelled", None)

    def expire(self, stage: str, text: str = "") -> None:
        """End a request: with DeadlineError if it has no token, where ``stage`` says how far it came.

        ``text`` is the rest of an answer that has begun.
        """
        if self._token_ids:
            self._text.append(text)
            self._end("deadline", None)
            return
        seconds = self.clock() - self.arrival
        self.fail(
            DeadlineError(f"the deadline of {self._deadline:g} s passed {stage}, {seconds:.3g} s after submission")
        )

    def _end(self, finish_reason: FinishReason | None, error: Qwen2VLError | None) -> None:
        if self.finished:
            return
        self.finish_reason, self.error = finish_reason, error
        self.timings.total = self.clock() - self.arrival
        if self._on_end is not None:
            self._on_end(self)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Event:
    """One token of one answer.

    Its request's number in the call, the text that it completed, the answer, and log-probabilities if asked for.
    """

    index: int
    token_id: int
    text: str
    output: Output = field(repr=False)
    logprobs: TokenLogprobs | None = None


__all__ = ["Event", "Output", "Request", "SamplingParams", "Timings", "TokenLogprobs"]
