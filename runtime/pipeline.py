"""Images, videos and prompts in, answers out: preprocessor, vision engine, decoder engine, sampler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen2vl_trt.errors import CheckpointError, LimitError, MediaError, Qwen2VLError, SamplingError
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.prompts import PromptBuilder, extract_media

from .detokenizer import AnswerStream
from .generation_config import GenerationConfig
from .images import ImageSource
from .media import LoadedImage, LoadedVideo, MediaEmbedder, StageTimes
from .preprocessor import Decode, Preprocessor
from .preprocessor_settings import PreprocessorSettings
from .request import Event, Output, Request
from .runners import Engines, open_engines
from .sampler import SamplingParams, SequenceSampling
from .scheduler import NewToken, RunningSequence, Scheduler

DEFAULT_MAX_NUM_TOKENS = 512


@dataclass(frozen=True)
class _Pending:
    """A request that waits for a slot."""

    request: Request
    params: SamplingParams
    output: Output


@dataclass(frozen=True)
class _Prepared:
    """A request whose media are loaded and whose prompt is tokenized: all that can be wrong with it is known."""

    token_ids: list[int]
    position_ids: Tensor
    delta: int
    images: list[LoadedImage]
    videos: list[LoadedVideo]


class Pipeline:
    """Runs requests on a pair of engines.

    One thread at a time: a pipeline is not to be shared between threads without a lock.

    Args:
        engines: see :func:`runtime.runners.open_engines`.
        min_pixels: smallest image area; smaller ones are enlarged. By default the checkpoint's.
        max_pixels: largest image area; larger ones are shrunk. By default the checkpoint's.
        max_num_tokens: most prompt tokens of one request that run before the other answers get their next token.
        decode: where JPEG files are decoded; the GPU, by nvImageCodec, makes pixels that differ by a level or so.
    """

    def __init__(
        self,
        engines: Engines,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_num_tokens: int = DEFAULT_MAX_NUM_TOKENS,
        decode: Decode = "cpu",
    ) -> None:
        folder, self._config = engines.checkpoint.folder, engines.checkpoint.config
        self.engines = engines
        self.profile = engines.manifest.profile
        settings = PreprocessorSettings.from_folder(folder).with_limits(min_pixels, max_pixels)
        preprocessor = Preprocessor(self._config.vision, settings, engines.device, engines.dtype, decode=decode)
        self._media = MediaEmbedder(preprocessor, engines.vision, self.profile, self._config.vision)
        self._prompts = PromptBuilder(folder, self._config)
        if len(self._prompts.tokenizer) > self._config.text.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {len(self._prompts.tokenizer):,} tokens, the model"
                f" {self._config.text.vocab_size:,}; it belongs to another model"
            )
        self._eos = GenerationConfig.from_folder(folder, self._prompts.tokenizer).eos_token_ids
        self._max_num_tokens = max_num_tokens
        self._waiting: deque[_Pending] = deque()

    @classmethod
    def from_engine_dir(
        cls,
        folder: str | Path,
        device: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_num_tokens: int = DEFAULT_MAX_NUM_TOKENS,
        decode: Decode = "cpu",
    ) -> Pipeline:
        """Open an engine folder that ``build_engines.py`` wrote.

        Raises:
            EngineError: no engine, damaged, of another format, or not runnable here.
            MissingDependencyError: ``decode="gpu"``, and nvImageCodec is not installed.
        """
        return cls(open_engines(folder, device), min_pixels, max_pixels, max_num_tokens, decode)

    def generate(
        self,
        requests: Request | Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_token: Callable[[Event], None] | None = None,
    ) -> list[Output]:
        """Answer requests, as many at a time as there are slots.

        Args:
            requests: they may differ in number and size of images, in length and in sampling.
            params: one for all, or one each; greedy by default.
            on_token: called at every token.

        Returns:
            One output a request, in order. A request that failed has ``error`` set and raises it where it is read.

        Raises:
            SamplingError: neither one setting for all nor one each.
        """
        outputs: list[Output] = []
        for event in self._events(requests, params, outputs):
            if on_token is not None:
                on_token(event)
        return outputs

    def stream(
        self, requests: Request | Sequence[Request], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Event]:
        """Answer requests, giving each token as it comes.

        Raises:
            Qwen2VLError: the first failure, after all other requests have ended.
        """
        outputs: list[Output] = []
        yield from self._events(requests, params, outputs)
        for output in outputs:
            if output.error is not None:
                raise output.error

    def submit(self, request: Request, params: SamplingParams | None = None) -> Output:
        """Queue a request; :meth:`step` works on it, beside those that already run."""
        _ = self._scheduler  # loads the decoder: not a part of the request's time
        output = Output()
        self._waiting.append(_Pending(request, params or SamplingParams(), output))
        return output

    @cached_property
    def _scheduler(self) -> Scheduler:
        return Scheduler(self.engines.decoder, self._max_num_tokens)

    @property
    def busy(self) -> bool:
        """Whether a submitted request has not ended."""
        return bool(self._waiting) or self._scheduler.busy

    def step(self) -> list[NewToken]:
        """Take in waiting requests where slots are free, then run one step of every one that runs."""
        self._admit()
        return self._scheduler.step() if self._scheduler.busy else []

    def cancel(self, output: Output) -> None:
        """Drop a request, waiting or running; its output stays as it is."""
        self._waiting = deque(pending for pending in self._waiting if pending.output is not output)
        self._scheduler.cancel(output)

    def embed_images(self, images: Sequence[ImageSource], on_done: Callable[[int], None] | None = None) -> list[Tensor]:
        """Vision embeddings ``[tokens, hidden]`` of each image, raster order, any mix of sizes.

        Args:
            images: as many as ``max_batch_size`` are decoded and embedded at a time.
            on_done: told how many are done, after each engine call.

        Raises:
            MediaError: an image cannot be read; named by its number, from 1.
            LimitError: an image is outside the engine's profile.
        """
        embeddings: list[Tensor] = []
        for first in range(0, len(images), self.profile.max_batch_size):
            group = images[first : first + self.profile.max_batch_size]
            loaded = [self._media.load_image(source, f"image {n}") for n, source in enumerate(group, start=first + 1)]
            embeddings += self._media.embed(loaded)[0]
            if on_done is not None:
                on_done(len(embeddings))
        return embeddings

    def hidden_states(self, requests: Sequence[Request]) -> list[Tensor]:
        """Decoder hidden states ``[S, hidden]`` of each prompt, after the final norm, image tokens included.

        Raises:
            Qwen2VLError: what is wrong with a request, named by its number, from 1.
        """
        while self.busy:  # the slots are needed
            self.step()
        states: list[Tensor | None] = [None] * len(requests)
        for first in range(0, len(requests), self.engines.decoder.slots):
            group = [
                self._prepare_named(request, f"request {number}: ")
                for number, request in enumerate(requests[first : first + self.engines.decoder.slots], start=first + 1)
            ]
            embeds, _ = self._embed(group)
            longest = max(len(item.token_ids) for item in group)
            # Rows are padded on the right; no token sees what follows it.
            inputs = torch.stack([pad(e, (0, 0, 0, longest - len(e))) for e in embeds])
            positions = torch.stack([pad(p.position_ids, (0, longest - len(p.token_ids))) for p in group], dim=1)
            output = self.engines.decoder.step(0, inputs, positions, [0] * len(group), hidden=True).hidden_states
            assert output is not None
            for offset, item in enumerate(group):
                states[first + offset] = output[offset, : len(item.token_ids)].clone()
            self.engines.decoder.reset()
        return [state for state in states if state is not None]

    def _events(
        self,
        requests: Request | Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams] | None,
        outputs: list[Output],
    ) -> Iterator[Event]:
        requests = [requests] if isinstance(requests, Request) else requests
        settings = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(requests)
        if len(settings) != len(requests):
            raise SamplingError(
                f"{len(requests)} requests came with {len(settings)} SamplingParams; give one or as many"
            )
        outputs += [self.submit(request, setting) for request, setting in zip(requests, settings, strict=True)]
        numbers = {id(output): number for number, output in enumerate(outputs)}
        try:
            while not all(output.finished for output in outputs):
                for new in self.step():
                    number = numbers.get(id(new.sequence.output))
                    if number is not None:  # not one that somebody else submitted
                        yield Event(number, new.token, new.text, new.sequence.output)
        finally:
            for output in outputs:
                if not output.finished:
                    self.cancel(output)

    def _admit(self) -> None:
        """Prepare waiting requests, as many as there are free slots, and embed their images together."""
        group: list[tuple[_Pending, _Prepared]] = []
        while self._waiting and len(group) < self._scheduler.free_slots:
            pending = self._waiting.popleft()
            began = time.perf_counter()
            try:
                prepared = self._prepare(pending.request)
                self._check_room(len(prepared.token_ids), pending.params.max_tokens)
            except Qwen2VLError as error:
                pending.output.fail(error)
                continue
            pending.output.timings.preprocess = time.perf_counter() - began
            pending.output.prompt_tokens = len(prepared.token_ids)
            group.append((pending, prepared))
        if not group:
            return
        embeds, times = self._embed([prepared for _, prepared in group])
        for (pending, prepared), inputs_embeds in zip(group, embeds):
            if prepared.images or prepared.videos:
                pending.output.timings.preprocess += times.preprocess
                pending.output.timings.vision = times.vision
            self._scheduler.add(
                RunningSequence(
                    output=pending.output,
                    inputs_embeds=inputs_embeds,
                    position_ids=prepared.position_ids,
                    delta=prepared.delta,
                    stream=AnswerStream(self._prompts.tokenizer, pending.params, self._eos),
                    sampling=SequenceSampling(
                        pending.params, prepared.token_ids, self._config.text.vocab_size, self.engines.device
                    ),
                )
            )

    def _prepare_named(self, request: Request, name: str) -> _Prepared:
        try:
            return self._prepare(request)
        except Qwen2VLError as error:
            raise type(error)(f"{name}{error}") from None

    def _prepare(self, request: Request) -> _Prepared:
        images, videos = _listed(request.images, "images", 4), _listed(request.videos, "videos", 5)
        fps: list[float | None] = [None] * len(videos)
        if not isinstance(request.prompt, str):
            media = extract_media(request.prompt, images, videos)
            images, videos, fps = media.images, media.videos, media.video_fps
        loaded = [self._media.load_image(source, f"image {n}") for n, source in enumerate(images, start=1)]
        clips = [self._media.load_video(source, f"video {n}", fps[n - 1]) for n, source in enumerate(videos, start=1)]
        image_grids, video_grids = [image.grid for image in loaded], [clip.grid for clip in clips]
        prompt = self._prompts.build(request.prompt, image_grids, video_grids)
        if len(prompt.token_ids) > self.profile.max_input_len:
            raise LimitError(
                f"the prompt has {len(prompt.token_ids):,} tokens; these engines take"
                f" {self.profile.max_input_len:,} (--max-input-len). Shorten it, shrink the images (--max-pixels), or"
                " rebuild."
            )
        seconds = [clip.second_per_grid for clip in clips]
        position_ids, delta = rope_index(prompt.token_ids, self._config, image_grids, video_grids, seconds)
        return _Prepared(prompt.token_ids, position_ids, delta, loaded, clips)

    def _check_room(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens + max_tokens > self.profile.max_seq_len:
            raise LimitError(
                f"the prompt's {prompt_tokens:,} tokens and max_tokens {max_tokens:,} exceed"
                f" {self.profile.max_seq_len:,} (--max-seq-len). Lower max_tokens to"
                f" {self.profile.max_seq_len - prompt_tokens:,} or less, or rebuild."
            )

    def _embed(self, group: Sequence[_Prepared]) -> tuple[list[Tensor], StageTimes]:
        """Decoder inputs ``[S, C]`` of each prompt, image and video tokens in place."""
        image_embeds, video_embeds, times = self._media.embed(
            [image for item in group for image in item.images], [video for item in group for video in item.videos]
        )
        next_image, next_video = iter(image_embeds), iter(video_embeds)
        inputs = []
        for item in group:
            embeds = self.engines.decoder.embed(item.token_ids)
            tokens = torch.tensor(item.token_ids, device=embeds.device)
            for token_id, parts in (
                (self._config.image_token_id, [next(next_image) for _ in item.images]),
                (self._config.video_token_id, [next(next_video) for _ in item.videos]),
            ):
                if parts:
                    embeds[tokens == token_id] = torch.cat(parts).to(embeds.dtype)
            inputs.append(embeds)
        return inputs, times


def _listed(media: Any, name: str, dimensions: int) -> list[Any]:
    """Several images or videos; a lone one would be taken for a list of its rows, a lone path for one of letters."""
    stacked = isinstance(media, (np.ndarray, Tensor)) and media.ndim == dimensions
    if not stacked and (not isinstance(media, Sequence) or isinstance(media, (str, bytes))):
        raise MediaError(f"{name} is a {type(media).__name__}, not a list; give {name}=[...] even for one")
    return list(media)
