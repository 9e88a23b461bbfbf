"""From a request to what the decoder reads: media found and loaded, prompt tokenized, positions and limits checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile, flag
from qwen2vl_trt.errors import LimitError, MediaError, PromptError
from qwen2vl_trt.media_options import VideoOptions
from qwen2vl_trt.messages import Media, extract_media, resolve_url
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.prompts import Prompt, PromptBuilder
from qwen2vl_trt.windows import Grid

from ..detokenizer import AnswerStream
from ..inputs.files import labelled
from ..inputs.images import decoding_bytes
from ..inputs.video import Video, options_for
from ..media.cached_media import CachedMedia
from ..observer import Observer, Stage, unobserved
from ..preprocessing.sizes import MediaSize, Medium
from ..request import Output, Request
from ..sampler import check_prompt
from ..sampling_params import Sampling
from ..structured_outputs import GrammarCompiler, Matcher
from .sequence import RunningSequence, token_keys


class Preparer:
    """Prepares the requests of one pipeline; with ``strict_size`` a video is not made shorter to fit the engines."""

    def __init__(
        self,
        media: CachedMedia,
        prompts: PromptBuilder,
        config: Qwen2VLConfig,
        profile: BuildProfile,
        eos_token_ids: Sequence[int],
        strict_size: bool = False,
        observe: Observer = unobserved,
    ) -> None:
        self._media, self._prompts, self._config, self._profile = media, prompts, config, profile
        self._eos_token_ids = eos_token_ids
        self.grammars = GrammarCompiler(prompts.tokenizer.backend_tokenizer, config.text.vocab_size, eos_token_ids)
        self._strict_size, self._observe = strict_size, observe

    def find_media(self, request: Request, params: Sampling | None = None) -> tuple[Media, int | None]:
        """A request's images and videos, its messages' included, each with its options.

        Returns:
            Beside the media, the most tokens of all together that the text, and ``max_tokens`` where ``params`` say it,
            leave; None without a video, which alone is fitted to them.

        Raises:
            MediaError: they are no list, or the options of a part are out of range.
            PromptError: the messages are wrong, have other numbers of places, or a URL is not of this machine.
        """
        images, videos = listed(request.images, "images", 4), listed(request.videos, "videos", 5)
        found = Media(images, videos, [request.image_options] * len(images), [VideoOptions()] * len(videos))
        if not isinstance(request.prompt, str):
            found = extract_media(request.prompt, images, videos)
            found = replace(found, image_options=[own.over(request.image_options) for own in found.image_options])
        pairs = zip(found.videos, found.video_options, strict=True)
        found = replace(found, video_options=[options_for(video, own, request.video_options) for video, own in pairs])
        found = replace(found, cache_salt=request.cache_salt)
        if not found.videos or self._strict_size:
            return found, None
        side = self._config.vision.spatial_merge_size
        single = (1, side, side)  # of one token
        count = len(found.images) + len(found.videos)
        prompt = self._prompts.build(
            request.prompt, [single] * len(found.images), [single] * len(found.videos), request.tools
        )
        most = self._profile.max_input_len
        if params is not None and params.max_tokens_given:
            most = min(most, self._profile.max_seq_len - params.max_tokens)
        return found, most - len(prompt.token_ids) + count

    def load(self, found: Media, most_tokens: int | None = None) -> list[Medium]:
        """Load what :meth:`find_media` found, the images and then the videos; any thread may.

        Raises:
            MediaError: an image or a video cannot be read.
            LimitError: one does not fit the engines, and sizes are strict.
        """
        stage = Stage("load")
        with self._observe(stage):
            loaded = self._load(found, most_tokens)
            stage.media += [medium.key for medium in loaded]
        return loaded

    def _load(self, found: Media, most_tokens: int | None) -> list[Medium]:
        media = []
        for number, (source, options) in enumerate(zip(found.images, found.image_options, strict=True), start=1):
            image = self._media.load_image(source, f"image {number}", options, found.cache_salt or "")
            media.append(self._noted(labelled(source, f"image {number}"), image.size, image))
        clips = [
            (source, f"video {number}", options, found.cache_salt or "")
            for number, (source, options) in enumerate(zip(found.videos, found.video_options, strict=True), start=1)
        ]
        asked = [self._media.load_video(*clip, whole=most_tokens is None) for clip in clips]
        fitting = asked
        if most_tokens is not None:
            fitting = self._shorten(clips, asked, most_tokens - sum(image.size.tokens for image in media))
        for clip, whole, video in zip(clips, asked, fitting, strict=True):
            if not video.frames and video.embeds is None:
                video = self._media.load_video(*clip)
            media.append(self._noted(labelled(*clip[:2]), whole.size, video))
        return media

    def _shorten(
        self, clips: list[tuple[Any, str, VideoOptions, str]], videos: list[Medium], left: int
    ) -> list[Medium]:
        """The videos in so many tokens; where that is too little, as they are.

        Those that are shorter than an equal share stay as they are, the others share the rest equally.
        """
        if sum(video.size.tokens for video in videos) <= left:
            return videos
        fitting = list(videos)
        for done, index in enumerate(sorted(range(len(videos)), key=lambda index: videos[index].size.tokens)):
            share = left // (len(videos) - done)
            if videos[index].size.tokens > share:
                shorter = self._media.shorten(videos[index], share, *clips[index])
                if shorter is None:
                    return videos
                fitting[index] = shorter
            left -= fitting[index].size.tokens
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

    def prepare(
        self,
        request: Request,
        params: Sampling,
        output: Output,
        media: list[Medium],
        matcher: Matcher | None = None,
    ) -> RunningSequence:
        """Tokenize a request's prompt around its media; now all that can be wrong with it is known.

        A ``max_tokens`` that the request did not say is lowered to what the prompt leaves. ``output`` gets the prompt's
        length and the sizes of the media.

        Raises:
            PromptError: the prompt does not fit the media, or features of none are asked for.
            LimitError: prompt and answer are outside the engines' profile.
        """
        if request.features == "image_features" and not media:
            raise PromptError("features is 'image_features', and the request has no image and no video")
        prompt, grids = self.prompt(request, media)
        params = self._fit_answer(len(prompt.token_ids), params)
        check_prompt(params, prompt.token_ids, self._config.text.vocab_size)
        images, videos = ([medium for medium in media if medium.is_video == is_video] for is_video in (False, True))
        output.prompt_tokens = len(prompt.token_ids)
        output.images, output.videos = [image.size for image in images], [video.size for video in videos]
        seconds = [video.size.second_per_grid for video in videos]
        position_ids, delta = rope_index(prompt.token_ids, self._config, *grids, seconds)
        kinds = ((self._config.image_token_id, images), (self._config.video_token_id, videos))
        tokens = np.asarray(prompt.token_ids)
        return RunningSequence(
            output=output,
            token_ids=prompt.token_ids,
            text=prompt.text,
            position_ids=position_ids,
            delta=delta,
            media=media,
            places=np.concatenate([np.flatnonzero(tokens == token_id) for token_id, _ in kinds]),
            keys=token_keys(
                prompt.token_ids,
                position_ids.numpy(),
                [(token_id, [m.key for m in each], [m.size.tokens for m in each]) for token_id, each in kinds],
                request.cache_salt if request.adapter is None else repr((request.adapter, request.cache_salt)),
            ),
            stream=AnswerStream(self._prompts.tokenizer.backend_tokenizer, params, self._eos_token_ids),
            params=params,
            matcher=matcher,
            features=request.features,
            adapter=request.adapter,
        )

    def prompt(self, request: Request, media: list[Medium]) -> tuple[Prompt, tuple[list[Grid], list[Grid]]]:
        """A request's prompt around its media, and the grids of images and of videos; raises as :meth:`prepare`."""
        images = [medium.size.grid for medium in media if not medium.is_video]
        videos = [medium.size.grid for medium in media if medium.is_video]
        prompt = self._prompts.build(request.prompt, images, videos, request.tools)
        if len(prompt.token_ids) <= self._profile.max_input_len:
            return prompt, (images, videos)
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

    def _fit_answer(self, prompt_tokens: int, params: Sampling) -> Sampling:
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

    ``dimensions`` are those of an array or a tensor that holds several. Raises MediaError where it is no list, and
    PromptError where a URL in it is not of this machine.
    """
    stacked = isinstance(media, (np.ndarray, Tensor)) and media.ndim == dimensions
    if not stacked and (not isinstance(media, Sequence) or isinstance(media, (str, bytes, bytearray))):
        raise MediaError(f"{name} is a {type(media).__name__}, not a list; give {name}=[...] even for one")
    plain = (bytes(item) if isinstance(item, (bytearray, memoryview)) else item for item in media)
    return [resolve_url(item, f"{name[:-1]} {number}") for number, item in enumerate(plain, start=1)]


def loading_bytes(found: Media) -> int | None:
    """Most memory that loading takes, from headers; None where one is a video file, whose frames nobody has counted."""
    total = sum(map(decoding_bytes, found.images))
    for video in found.videos:
        frames = video.frames if isinstance(video, Video) else video
        if isinstance(frames, (str, Path, bytes)):
            return None
        if isinstance(frames, Sequence):
            total += sum(map(decoding_bytes, frames))
        elif isinstance(frames, (np.ndarray, Tensor)):
            total += frames.nbytes
    return total


def on_gpu(source: Any) -> bool:
    """Whether an image, a video or one of several is not on the host."""
    if isinstance(source, Tensor):
        return source.device.type != "cpu"
    if isinstance(source, Video):
        source = source.frames
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes)) and any(map(on_gpu, source))
