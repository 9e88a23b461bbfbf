"""From the body of a request to what the pipeline takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import msgspec
from anyio import move_on_after

from qwen2vl_trt.errors import DeadlineError, MediaError, SamplingError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.messages import detach_media
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.runtime.structured_outputs import StructuredOutputsParams

from .errors import APIError
from .limits import Limits
from .media import Hold, MediaKind, MediaSource
from .protocol import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, GenerationRequest, TokenizeRequest

_SAME = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_IMAGE_OPTIONS = {each.name for each in fields(ImageOptions)}


def sampling_params(body: ChatCompletionRequest | CompletionRequest, limits: Limits) -> list[SamplingParams]:
    """The settings of each of the body's ``n`` answers, which differ in the seed.

    Raises:
        APIError: 400, a limit of the server, or fields that contradict each other.
        SamplingError: a value that has no meaning.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if isinstance(body, CompletionRequest):
        logprobs_field, most_tokens, logprobs = "logprobs", body.max_tokens, body.logprobs
    else:
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs: it needs logprobs: true", param="top_logprobs")
        logprobs_field, logprobs = "top_logprobs", (body.top_logprobs or 0) if body.logprobs else None
        most_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    for name, count, most in (
        ("n", body.n or 1, min(limits.n, limits.pending)),
        ("stop", len(stop), limits.stop),
        ("stop_token_ids", len(body.stop_token_ids or ()), limits.stop_token_ids),
        ("logit_bias", len(body.logit_bias or ()), limits.logit_bias),
        (logprobs_field, logprobs or 0, limits.top_logprobs),
    ):
        if count > most:
            raise APIError(400, f"{name}: {count:,} are asked for; this server takes up to {most:,}", param=name)
    params = SamplingParams(
        **{name: getattr(body, name) for name in _SAME},
        max_tokens=most_tokens,
        top_k=0 if body.top_k == -1 else body.top_k,
        seed=body.seed,
        stop=tuple(stop) if body.stop is not None else None,
        stop_token_ids=None if body.stop_token_ids is None else tuple(body.stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        logit_bias=_logit_bias(body.logit_bias),
        structured_outputs=_structured_outputs(body),
    )
    if body.seed is None:
        return [params] * (body.n or 1)
    return [replace(params, seed=(body.seed + number) % (1 << 63)) for number in range(body.n or 1)]


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    try:
        return {int(token): bias for token, bias in given.items()} if given else None
    except ValueError:
        raise APIError(400, "logit_bias: its keys are token ids, as strings", param="logit_bias") from None


def _structured_outputs(body: GenerationRequest) -> StructuredOutputsParams | None:
    own, form = body.structured_outputs, body.response_format
    asked = (
        {name: value for name, value in msgspec.structs.asdict(own).items() if value not in (None, False)}
        if own
        else {}
    )
    if form is None or form.type == "text":
        name = "structured_outputs"
    elif asked:
        message = "response_format and structured_outputs contradict each other; give one"
        raise APIError(400, message, param="structured_outputs")
    else:
        name = "response_format"
        if form.type == "json_object":
            asked = {"json_object": True}
        elif form.json_schema is None:
            raise APIError(400, "response_format: type json_schema needs json_schema", param=name)
        else:
            asked = {"json": form.json_schema.schema}
    if not asked:
        return None
    try:
        return StructuredOutputsParams(**asked)
    except SamplingError as error:
        raise APIError(400, str(error), param=name) from None


def media_options(given: Mapping[str, Any] | None) -> tuple[ImageOptions, VideoOptions]:
    """``mm_processor_kwargs`` as options of all images and of all videos; or APIError 400."""
    given = given or {}
    try:
        videos = VideoOptions(**given)
        return ImageOptions(**{name: value for name, value in given.items() if name in _IMAGE_OPTIONS}), videos
    except TypeError:
        reason = f"unknown name; known are {', '.join(each.name for each in fields(VideoOptions))}"
    except MediaError as error:
        reason = str(error)
    raise APIError(400, f"mm_processor_kwargs: {reason}", param="mm_processor_kwargs")


@dataclass(frozen=True)
class Conversation:
    """OpenAI's messages, taken apart.

    Attributes:
        messages: with their media named by number.
        media: kind, URL or list of URLs, and place of each, see :meth:`MediaSource.fetch_all`.
        image_options: of all images.
        video_options: of all videos.
    """

    messages: list[dict[str, Any]]
    media: list[tuple[MediaKind, Any, str]]
    image_options: ImageOptions
    video_options: VideoOptions

    @classmethod
    def of(cls, body: ChatCompletionRequest | EmbeddingRequest | TokenizeRequest, limits: Limits) -> Conversation:
        """Of the body of a request.

        Raises:
            APIError: 400, too many messages with their parts, images or videos, or a wrong option.
            PromptError: the messages are wrong.
        """
        options = media_options(body.mm_processor_kwargs)
        given = body.messages or []
        contents = (message.get("content") for message in given)
        parts = len(given) + sum(len(content) for content in contents if isinstance(content, list))
        if parts > limits.parts:
            message = f"messages: {parts:,} with their parts; this server takes {limits.parts:,}"
            raise APIError(400, message, param="messages")
        messages, media = detach_media(given)
        for kind, most in (("image", limits.images), ("video", limits.videos)):
            count = sum(each == kind for each, _, _ in media)
            if count > most:
                raise APIError(400, f"messages: {count:,} {kind}s; this server takes up to {most:,}", param="messages")
        return cls(messages, media, *options)

    async def fetched(
        self,
        source: MediaSource,
        hold: Hold,
        cache_salt: str | None = None,
        deadline: float | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Request:
        """The request of the pipeline, with its images and videos, whose fetching its deadline counts.

        Args:
            source: of the media.
            hold: see :meth:`MediaSource.fetch_all`.
            cache_salt: of the request.
            deadline: its seconds from now.
            tools: that the model is told of.

        Raises:
            APIError: a medium is not taken or cannot be had; what ``hold`` raises.
            DeadlineError: it passed before all media were there.
        """
        began = time.perf_counter()
        with move_on_after(deadline) as patience:
            found = await source.fetch_all(self.media, hold)
        if patience.cancelled_caught:
            raise DeadlineError(f"the deadline of {deadline:g} s passed while images and videos were fetched")
        if deadline is not None:
            deadline = max(1e-9, deadline - time.perf_counter() + began)
        images, videos = (
            [medium for medium, (each, _, _) in zip(found, self.media, strict=True) if each == kind]
            for kind in ("image", "video")
        )
        return Request(
            self.messages,
            images,  # type: ignore[arg-type]  # bytes; frames of a video alone are lists
            videos,
            deadline=deadline,
            image_options=self.image_options,
            video_options=self.video_options,
            cache_salt=cache_salt,
            tools=tools,
        )
