"""From a request to what the decoder reads: media loaded and embedded, prompt tokenized, positions and limits known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.profile import BuildProfile
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.media_options import VideoOptions
from qwen2vl_trt.messages import extract_media
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.prompts import PromptBuilder

from ..media.cached_media import CachedMedia, Medium
from ..media.embedder import StageTimes
from ..request import Request
from ..sampler import Sampling
from ..sending import send
from .prefix import token_keys


@dataclass(frozen=True)
class MediaSources:
    """What a request gives as images and videos, its messages' included, and each video's ``fps`` where they say."""

    images: list[Any]
    videos: list[Any]
    fps: list[float | None]


@dataclass(frozen=True)
class LoadedMedia:
    """Images and videos, each in the order of the request."""

    images: list[Medium]
    videos: list[Medium]

    @property
    def nbytes(self) -> int:
        """Of their pixels."""
        return sum(medium.nbytes for medium in (*self.images, *self.videos))


@dataclass(frozen=True)
class Prepared:
    """A request whose media are loaded and whose prompt is tokenized: all that can be wrong with it is known.

    Attributes:
        token_ids: S of them.
        text: the rendered chat template, one vision token an image or video.
        position_ids: ``[3, S]``.
        delta: position of a generated token minus its index.
        images: in the order of their tokens.
        videos: the same.
        keys: ``[S, 6]``, see :func:`runtime.scheduling.prefix.token_keys`.
    """

    token_ids: list[int]
    text: str
    position_ids: Tensor
    delta: int
    images: list[Medium]
    videos: list[Medium]
    keys: np.ndarray

    @property
    def nbytes(self) -> int:
        """Of its media's pixels."""
        return LoadedMedia(self.images, self.videos).nbytes


class Preparer:
    """Prepares the requests of one pipeline.

    Args:
        media: loads and embeds.
        prompts: tokenizes.
        config: the model.
        profile: the engines' limits.
    """

    def __init__(
        self, media: CachedMedia, prompts: PromptBuilder, config: Qwen2VLConfig, profile: BuildProfile
    ) -> None:
        self._media, self._prompts, self._config, self._profile = media, prompts, config, profile

    def sources(self, request: Request) -> MediaSources:
        """Find a request's media.

        Raises:
            MediaError: they are no list.
            PromptError: the messages are wrong, or have other numbers of places.
        """
        images, videos = _listed(request.images, "images", 4), _listed(request.videos, "videos", 5)
        fps: list[float | None] = [None] * len(videos)
        if not isinstance(request.prompt, str):
            media = extract_media(request.prompt, images, videos)
            images, videos, fps = media.images, media.videos, [options.fps for options in media.video_options]
        return MediaSources(images, videos, fps)

    def load(self, sources: MediaSources) -> LoadedMedia:
        """Load them; any thread may.

        Raises:
            MediaError: an image or a video cannot be read.
            LimitError: one is outside the engines' profile.
        """
        images = [self._media.load_image(source, f"image {n}") for n, source in enumerate(sources.images, start=1)]
        videos = [
            self._media.load_video(source, f"video {n}", VideoOptions(fps=fps))
            for n, (source, fps) in enumerate(zip(sources.videos, sources.fps, strict=True), start=1)
        ]
        return LoadedMedia(images, videos)

    def prepare(self, request: Request, media: LoadedMedia | None = None) -> Prepared:
        """Tokenize a request's prompt around its media.

        Args:
            request: what is to be prepared.
            media: where they are loaded already.

        Raises:
            PromptError: the prompt does not fit them.
            LimitError: the prompt is outside the engines' profile.
            MediaError: see :meth:`sources` and :meth:`load`, which load what is not given.
        """
        media = self.load(self.sources(request)) if media is None else media
        loaded, clips = media.images, media.videos
        image_grids, video_grids = [image.grid for image in loaded], [clip.grid for clip in clips]
        prompt = self._prompts.build(request.prompt, image_grids, video_grids)
        if len(prompt.token_ids) > self._profile.max_input_len:
            raise LimitError(
                f"the prompt has {len(prompt.token_ids):,} tokens; these engines take"
                f" {self._profile.max_input_len:,} (--max-input-len). Shorten it, shrink the images (--max-pixels), or"
                " rebuild."
            )
        seconds = [clip.second_per_grid for clip in clips]
        position_ids, delta = rope_index(prompt.token_ids, self._config, image_grids, video_grids, seconds)
        keys = token_keys(
            prompt.token_ids,
            position_ids.numpy(),
            [
                (token_id, [medium.key for medium in media], [self._tokens(medium) for medium in media])
                for token_id, media in ((self._config.image_token_id, loaded), (self._config.video_token_id, clips))
            ],
        )
        return Prepared(prompt.token_ids, prompt.text, position_ids, delta, loaded, clips, keys)

    def fit_answer(self, prompt_tokens: int, params: Sampling) -> Sampling:
        """The settings, with ``max_tokens`` lowered to what the prompt leaves of a slot if the request did not say it.

        Raises:
            LimitError: prompt and answer never fit a slot of the cache.
        """
        most = self._profile.max_seq_len - prompt_tokens
        if params.max_tokens <= most:
            return params
        if most >= 1 and not params.max_tokens_given:
            return replace(params, max_tokens=most)
        raise LimitError(
            f"the prompt's {prompt_tokens:,} tokens and max_tokens {params.max_tokens:,} exceed"
            f" {self._profile.max_seq_len:,} (--max-seq-len). Lower max_tokens to {most:,} or less, or rebuild."
        )

    def embed(
        self, group: Sequence[Prepared], embed_tokens: Callable[[list[int]], Tensor]
    ) -> tuple[list[Tensor], StageTimes]:
        """Decoder inputs ``[S, C]`` of each prompt, image and video tokens in place, and the time that media took.

        Args:
            group: their media are embedded together.
            embed_tokens: the decoder's :meth:`~runtime.backends.runners.DecoderRunner.embed`.
        """
        embeds, times = self._media.embed([medium for item in group for medium in (*item.images, *item.videos)])
        following = iter(embeds)
        inputs = []
        for item in group:
            row = embed_tokens(item.token_ids)
            tokens = np.asarray(item.token_ids)
            for token_id, media in (
                (self._config.image_token_id, item.images),
                (self._config.video_token_id, item.videos),
            ):
                if media:
                    # Found on the host: a mask on a GPU would have to be counted, which waits for all before it.
                    places = send(np.flatnonzero(tokens == token_id), row.device)
                    row.index_copy_(0, places, torch.cat([next(following) for _ in media]).to(row.dtype))
            inputs.append(row)
        return inputs, times

    def _tokens(self, medium: Medium) -> int:
        t, h, w = medium.grid
        return t * h * w // self._config.vision.merge_unit


def _listed(media: Any, name: str, dimensions: int) -> list[Any]:
    """Several images or videos; a lone one would be taken for a list of its rows, a lone path for one of letters."""
    stacked = isinstance(media, (np.ndarray, Tensor)) and media.ndim == dimensions
    if not stacked and (not isinstance(media, Sequence) or isinstance(media, (str, bytes))):
        raise MediaError(f"{name} is a {type(media).__name__}, not a list; give {name}=[...] even for one")
    return list(media)
