"""From a request to what the decoder reads: media loaded and embedded, prompt tokenized, positions and limits known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile, flag
from qwen2vl_trt.errors import LimitError, MediaError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.messages import extract_media, resolve_url
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.prompts import PromptBuilder

from ..inputs.files import labelled
from ..inputs.video import options_for
from ..media.cached_media import CachedMedia
from ..observer import Observer, Stage, unobserved
from ..preprocessing.medium import Medium
from ..preprocessing.sizes import MediaSize
from ..request import Request
from ..sampler import Sampling
from ..sending import send
from .prefix import token_keys


@dataclass(frozen=True)
class MediaSources:
    """What a request gives as images and videos, its messages' included.

    Attributes:
        images: in the order of their tokens.
        videos: likewise.
        image_options: of each image.
        video_options: of each video.
        room: tokens of all images and videos together that the text leaves; None where there is no video, which alone
            follows it.
    """

    images: list[Any]
    videos: list[Any]
    image_options: list[ImageOptions]
    video_options: list[VideoOptions]
    room: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A request whose media are loaded and whose prompt is tokenized: all that can be wrong with it is known.

    Attributes:
        token_ids: S of them.
        text: the rendered chat template, one vision token an image or video.
        position_ids: ``[3, S]``.
        delta: position of a generated token minus its index.
        media: the images in the order of their tokens, then the videos.
        places: the media's tokens in the prompt, in the order of the media.
        keys: ``[S, 6]``, see :func:`qwen2vl_trt.runtime.scheduling.prefix.token_keys`.
    """

    token_ids: list[int]
    text: str
    position_ids: Tensor
    delta: int
    media: list[Medium]
    places: np.ndarray
    keys: np.ndarray

    @property
    def nbytes(self) -> int:
        """Of its media's pixels."""
        return sum(medium.nbytes for medium in self.media)

    def inputs_embeds(self, embed_tokens: Callable[[list[int]], Tensor], embeds: Sequence[Tensor]) -> Tensor:
        """Decoder inputs ``[S, C]``, image and video tokens in place.

        Args:
            embed_tokens: the decoder's :meth:`~qwen2vl_trt.runtime.backends.runners.DecoderRunner.embed`.
            embeds: of each of the media.
        """
        rows = embed_tokens(self.token_ids)
        if embeds:
            # Found on the host: a mask on a GPU would have to be counted, which waits for all before it.
            rows.index_copy_(0, send(self.places, rows.device), torch.cat(list(embeds)).to(rows.dtype))
        return rows


class Preparer:
    """Prepares the requests of one pipeline.

    Args:
        media: loads and embeds.
        prompts: tokenizes.
        config: the model.
        profile: the engines' limits.
        strict_size: a video is not made shorter to fit them.
        observe: surrounds every ``load``.
    """

    def __init__(
        self,
        media: CachedMedia,
        prompts: PromptBuilder,
        config: Qwen2VLConfig,
        profile: BuildProfile,
        strict_size: bool = False,
        observe: Observer = unobserved,
    ) -> None:
        self._media, self._prompts, self._config, self._profile = media, prompts, config, profile
        self._strict_size, self._observe = strict_size, observe

    def sources(self, request: Request, params: Sampling | None = None) -> MediaSources:
        """Find a request's media.

        Args:
            request: it.
            params: of its answer, if there will be one; where they say ``max_tokens``, videos leave room for these.

        Raises:
            MediaError: they are no list, or the options of a part are out of range.
            PromptError: the messages are wrong, have other numbers of places, or a URL is not of this machine.
        """
        images, videos = listed(request.images, "images", 4), listed(request.videos, "videos", 5)
        image_options, video_options = [request.image_options] * len(images), [VideoOptions()] * len(videos)
        if not isinstance(request.prompt, str):
            media = extract_media(request.prompt, images, videos)
            images, videos = media.images, media.videos
            image_options = [options.over(request.image_options) for options in media.image_options]
            video_options = media.video_options
        video_options = [
            options_for(source, own, request.video_options) for source, own in zip(videos, video_options, strict=True)
        ]
        room = None
        if videos and not self._strict_size:
            side = self._config.vision.spatial_merge_size
            single = (1, side, side)  # of one token
            prompt = self._prompts.build(request.prompt, [single] * len(images), [single] * len(videos))
            most = self._profile.max_input_len
            if params is not None and params.max_tokens_given:
                most = min(most, self._profile.max_seq_len - params.max_tokens)
            room = most - len(prompt.token_ids) + len(images) + len(videos)
        return MediaSources(images, videos, image_options, video_options, room)

    def load(self, sources: MediaSources) -> list[Medium]:
        """Load the images and then the videos; any thread may.

        Raises:
            MediaError: an image or a video cannot be read.
            LimitError: one does not fit the engines, and sizes are strict.
        """
        stage = Stage("load")
        with self._observe(stage):
            loaded = self._load(sources)
            stage.media += [medium.key for medium in loaded]
        return loaded

    def _load(self, sources: MediaSources) -> list[Medium]:
        images = [
            self._media.load_image(source, f"image {n}", options)
            for n, (source, options) in enumerate(zip(sources.images, sources.image_options, strict=True), start=1)
        ]
        clips = [
            (source, f"video {n}", options)
            for n, (source, options) in enumerate(zip(sources.videos, sources.video_options, strict=True), start=1)
        ]
        asked = [self._media.load_video(*clip, whole=sources.room is None) for clip in clips]
        room = None if sources.room is None else sources.room - sum(image.size.tokens for image in images)
        videos = [
            video if video.frames or video.embeds is not None else self._media.load_video(*clip)
            for clip, video in zip(clips, self._shorten(clips, asked, room))
        ]
        noted = [
            self._noted(labelled(source, f"image {n}"), image.size, image)
            for n, (source, image) in enumerate(zip(sources.images, images), start=1)
        ]
        noted += [
            self._noted(labelled(source, name), whole.size, video)
            for (source, name, _), whole, video in zip(clips, asked, videos)
        ]
        return noted

    def _shorten(
        self, clips: list[tuple[Any, str, VideoOptions]], videos: list[Medium], room: int | None
    ) -> list[Medium]:
        """The videos in what text and images leave; where that is too little, as they are.

        Those that are shorter than an equal share keep what they have, the others share the rest equally.
        """
        if room is None or sum(video.size.tokens for video in videos) <= room:
            return videos
        fitting = list(videos)
        for done, index in enumerate(sorted(range(len(videos)), key=lambda index: videos[index].size.tokens)):
            share = room // (len(videos) - done)
            if videos[index].size.tokens > share:
                shorter = self._media.shorten(videos[index], share, *clips[index])
                if shorter is None:
                    return videos
                fitting[index] = shorter
            room -= fitting[index].size.tokens
        return fitting

    def _noted(self, name: str, asked: MediaSize, medium: Medium) -> Medium:
        size = medium.size
        if size.limited_by is None:
            return medium
        what = f"{size.resized_width}x{size.resized_height}"
        if size.frames is not None:
            what = f"{size.frames} frames of {what}"
        if size != asked:
            what += f" in place of {asked.frames} of {asked.resized_width}x{asked.resized_height}"
        limits = [size.limited_by, "max_seq_len"] if size.limited_by == "max_input_len" else [size.limited_by]
        if size.limited_by in ("min_pixels", "max_pixels"):
            why = f"in place of the size that is asked for, by the checkpoint's {size.limited_by}"
        else:
            numbers = ", ".join(f"{flag(limit)} {getattr(self._profile, limit):,}" for limit in limits)
            why = f"to fit the engines ({numbers})"
        note = f"{name} ({size.width}x{size.height}) is resized to {what} {why}; --strict-size refuses it"
        return replace(medium, note=note)

    def prepare(self, request: Request, media: list[Medium] | None = None) -> Prepared:
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
        images = [medium for medium in media if not medium.is_video]
        videos = [medium for medium in media if medium.is_video]
        image_grids, video_grids = [image.size.grid for image in images], [video.size.grid for video in videos]
        prompt = self._prompts.build(request.prompt, image_grids, video_grids)
        if len(prompt.token_ids) > self._profile.max_input_len:
            ways = ["Shorten the text"]
            if images:
                ways.append("shrink the images (max_pixels)")
            if videos and self._strict_size:
                ways.append("leave --strict-size out, so that videos are made to fit")
            if videos:
                ways.append("ask for fewer frames of videos (nframes, min_frames, max_frames)")
            raise LimitError(
                f"the prompt has {len(prompt.token_ids):,} tokens; these engines take"
                f" {self._profile.max_input_len:,} (--max-input-len). {', '.join(ways)}, or rebuild."
            )
        seconds = [video.size.second_per_grid for video in videos]
        position_ids, delta = rope_index(prompt.token_ids, self._config, image_grids, video_grids, seconds)
        kinds = ((self._config.image_token_id, images), (self._config.video_token_id, videos))
        tokens = np.asarray(prompt.token_ids)
        places = np.concatenate([np.flatnonzero(tokens == token_id) for token_id, _ in kinds])
        keys = token_keys(
            prompt.token_ids,
            position_ids.numpy(),
            [(token_id, [m.key for m in each], [m.size.tokens for m in each]) for token_id, each in kinds],
        )
        return Prepared(prompt.token_ids, prompt.text, position_ids, delta, [*images, *videos], places, keys)

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


def listed(media: Any, name: str, dimensions: int) -> list[Any]:
    """Several images or videos; a lone one would be taken for a list of its rows, a lone path for one of letters.

    Args:
        media: what is given.
        name: ``images`` or ``videos``.
        dimensions: of an array or a tensor that holds several.

    Raises:
        MediaError: no list.
        PromptError: a URL in it is not of this machine.
    """
    stacked = isinstance(media, (np.ndarray, Tensor)) and media.ndim == dimensions
    if not stacked and (not isinstance(media, Sequence) or isinstance(media, (str, bytes, bytearray))):
        raise MediaError(f"{name} is a {type(media).__name__}, not a list; give {name}=[...] even for one")
    plain = (bytes(item) if isinstance(item, (bytearray, memoryview)) else item for item in media)
    return [resolve_url(item, f"{name[:-1]} {number}") for number, item in enumerate(plain, start=1)]
