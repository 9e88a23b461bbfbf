"""Images, videos and prompts in, answers out: preprocessor, vision engine, decoder engine, sampler."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from qwen2vl_trt.errors import LimitError, MediaError, PromptError, Qwen2VLError, SamplingError
from qwen2vl_trt.prompts import Prompt

from .backends.runners import Engines, VisionRunner, open_engines
from .exclusive import Exclusive, exclusive
from .inputs.clips import VideoLimits
from .inputs.images import ImageLimits, ImageSource, check_pixels
from .media.cached_media import CachedMedia, EmbeddingCache
from .media.embedder import MediaEmbedder, StageTimes
from .model_files import ModelFiles
from .observer import Observer, Stage, unobserved
from .options import PipelineOptions
from .prefetcher import Prefetcher
from .preprocessing.preprocessor import Preprocessor
from .request import Event, Output, Request
from .sampling_params import Sampling, SamplingParams
from .scheduling.executor import Counters, Executor, NewToken, SelfScheduling, named
from .scheduling.preparation import Preparer, listed
from .scheduling.request_queue import RequestQueue
from .scheduling.scheduler import Scheduler
from .scheduling.sequence import RunningSequence
from .scheduling.side_stream import SideStream

_LOAD_THREADS = min(4, os.cpu_count() or 1)

_logger = logging.getLogger(__name__)


class Pipeline:
    """Runs requests on a pair of engines.

    Any thread of the process that made it may call its methods; they run one at a time, so that a call waits for the
    step that another thread is in. How requests share a pipeline is told in docs/design/scheduler.md.

    Args:
        engines: see :func:`qwen2vl_trt.runtime.backends.runners.open_engines`.
        options: see :class:`~qwen2vl_trt.runtime.options.PipelineOptions`.
        clock: seconds, for deadlines and all timings but ``vision``, the packing of pixels and what threads load; a
            simulation brings its own.
        observe: surrounds every stage, see :mod:`qwen2vl_trt.runtime.observer`.
        vision: embeds in place of the folder's vision engine, which is not loaded then.

    Attributes:
        tokenizer: the checkpoint's.
    """

    def __init__(
        self,
        engines: Engines,
        options: PipelineOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
        observe: Observer = unobserved,
        vision: VisionRunner | None = None,
    ) -> None:
        options = options or PipelineOptions()
        folder, self._config = engines.checkpoint.folder, engines.checkpoint.config
        self.profile = engines.manifest.profile
        self.options = options
        files = ModelFiles.read(folder, self._config, self.profile, options)
        if options.lora_modules:
            engines = engines.with_adapters(options.lora_modules)
        self.engines = engines
        self._prompts = files.prompts
        self.settings, self._generation = files.settings, files.generation
        self.tokenizer: Tokenizer = files.prompts.tokenizer.backend_tokenizer
        preprocessor = Preprocessor(
            self._config.vision,
            self.settings,
            engines.device,
            engines.dtype,
            decode=options.decode,
            image_limits=ImageLimits(options.image_pixel_limit),
            video_limits=VideoLimits(options.video_pixel_limit, options.video_decode_seconds),
        )
        self._tokens_per_step = options.tokens_per_step(engines.device)
        self._media = MediaEmbedder(
            preprocessor, vision or engines.vision, self.profile, self._config.vision, observe, self._tokens_per_step
        )
        defaults = self._generation.defaults
        changed = {
            name: value
            for name, neutral in (("repetition_penalty", 1), ("min_p", 0))
            if (value := getattr(defaults, name)) not in (None, neutral)
        }
        if isinstance(engines.runner, SelfScheduling) and changed:
            _logger.warning(
                "%s: left out, as backend %s does not apply it: %s; answers may differ from the other backends'",
                folder,
                engines.manifest.backend,
                ", ".join(f"{name} {value:g}" for name, value in changed.items()),
            )
            off: dict[str, Any] = dict.fromkeys(changed)
            self._generation = replace(self._generation, defaults=replace(defaults, **off))
        self._embeddings = EmbeddingCache(options.embedding_cache_bytes)
        self._cached_media = CachedMedia(self._media, self._embeddings)
        self._preparer = Preparer(
            self._cached_media,
            files.prompts,
            self._config,
            self.profile,
            self._generation.eos_token_ids,
            options.strict_size,
            observe,
        )
        self._prefetcher = Prefetcher(_LOAD_THREADS, options.ahead_bytes, "load-media")
        self._side = SideStream.beside(engines.device) if options.overlap else SideStream(engines.device, None)
        self._clock, self._observe = clock, observe
        self._counters = Counters()
        self._queue = RequestQueue(self._preparer, self._prefetcher, options.overlap and options.decode == "cpu", clock)
        self._loaded_executor: Executor | None = None
        self._alone = Exclusive()
        self._listeners: dict[Output, tuple[int, deque[Event]]] = {}  # whoever steps, they get their tokens

    @classmethod
    def from_engine_dir(
        cls,
        folder: str | Path,
        device: str | None = None,
        options: PipelineOptions | None = None,
    ) -> Pipeline:
        """Open an engine folder that a build wrote.

        Raises:
            EngineError: no engine, damaged, of another format, or not runnable here.
            MissingDependencyError: ``decode="gpu"``, and nvImageCodec is not installed.
        """
        return cls(open_engines(folder, device), options)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        backend: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        options: PipelineOptions | None = None,
        **settings: Any,
    ) -> Pipeline:
        """Open a model's engines, which are built below ``artifacts/`` in the current folder where they are missing.

        Args:
            model: ``tiny``, ``Qwen2.5-VL-{3B,7B,32B,72B}``, a hub id ``Org/Name`` or a checkpoint folder.
            backend: as ``--backend``.
            precision: as ``--precision``.
            device: ``cpu``, ``cuda``, ``cuda:1``; by default a GPU where the backend can use one here.
            options: see :class:`~qwen2vl_trt.runtime.options.PipelineOptions`.
            settings: other options of a build by name, ``lora="adapter/"``, ``max_num_seqs=4``, ``engine_dir=...``,
                ``force=True``.

        Raises:
            BuildError: an option has no meaning, other engines are there, or they cannot be built.
            CheckpointError: the model cannot be found, or used.
            EngineError: the engines do not run here.
            MissingDependencyError: a package is not installed.
        """
        building = import_module("qwen2vl_trt.building.folder")  # above this package: it calibrates FP8 with it
        given = {"model": model, "backend": backend, "precision": precision, "device": device, **settings}
        folder = building.engine_folder(building.BuildRequest.of(given), options)
        return cls.from_engine_dir(folder, device, options)

    def generate(
        self,
        requests: Request | Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_token: Callable[[Event], None] | None = None,
    ) -> list[Output]:
        """Answer requests, as many at a time as there are slots.

        Args:
            requests: they may differ in number and size of images, in length and in sampling.
            params: one for all, or one each; by default the checkpoint's ``generation_config.json``.
            on_token: called at every token.

        Returns:
            One output a request, in order. A request that failed has ``error`` set and raises it where it is read.

        Raises:
            SamplingError: neither one setting for all nor one each.
            PromptError: not :class:`Request`.
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

    @exclusive
    def submit(self, request: Request, params: SamplingParams | None = None, output: Output | None = None) -> Output:
        """Queue a request; :meth:`step` works on it, beside those that already run.

        One that can never fit fails: at once if its ``max_tokens`` alone are too many, else as soon as it is among the
        first that wait and its prompt's length is known. Its output then has the LimitError.

        Args:
            request: see there.
            params: by default the checkpoint's ``generation_config.json``; features need none.
            output: where the answer goes, if :meth:`new_output` has made it when the request arrived.

        Raises:
            PromptError: not a :class:`Request`, or there is no such adapter.
            EngineError: it asks for features that the backend does not give.
        """
        self.load()  # not a part of the request's time
        self._check_request(request)
        if request.features == "last_hidden_state":
            _ = self.engines.decoder  # refused where the backend shows nothing of it
        sampling = self.decided(params) if request.features is None else Sampling(max_tokens=1)
        output = output or self.new_output(request)
        self._counters.submitted += 1
        if sampling.max_tokens_given and sampling.max_tokens >= self.profile.max_seq_len:
            output.fail(
                LimitError(
                    f"max_tokens {sampling.max_tokens:,} leaves no room for a prompt in {self.profile.max_seq_len:,}"
                    f" (--max-seq-len). Lower max_tokens to {self.profile.max_seq_len:,} less the prompt's tokens, or"
                    " rebuild."
                )
            )
            return output
        try:
            sampling.check_vocabulary(self._config.text.vocab_size)
        except SamplingError as error:
            output.fail(error)
            return output
        if sampling.logprobs is not None:
            output.logprobs = []
        self._queue.add(request, sampling, output)
        return output

    def decided(self, params: SamplingParams | None = None) -> Sampling:
        """A request's settings with the checkpoint's defaults, as ``generation_config`` of the options says.

        Raises:
            SamplingError: not :class:`SamplingParams`.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise SamplingError(
                f"params is of type {type(params).__name__}; give SamplingParams(max_tokens=...), from qwen2vl_trt"
            )
        return (params or SamplingParams()).with_defaults(self._generation.defaults)

    def new_output(self, request: Request) -> Output:
        """Where a request's answer is to go; its deadline and its timings begin now. Any thread may, without a wait.

        Raises:
            PromptError: not a :class:`Request`, or there is no such adapter.
        """
        self._check_request(request)
        return Output(deadline=request.deadline, clock=self._clock, on_end=self._counters.record_end)

    def interrupt(self) -> None:
        """Let a step that waits for media go on without them. Any thread may, without a wait."""
        self._queue.interrupt()

    def check_process(self) -> None:
        """See that this is the process that made the pipeline; raises ExecutionError in one that was forked from it."""
        self._alone.check_process()

    @exclusive
    def load(self) -> None:
        """Load the decoder now, instead of with the first request; raises EngineError where it does not load."""
        self._executor()

    def _executor(self) -> Executor:
        if self._loaded_executor is None:
            runner, options = self.engines.runner, self.options
            if isinstance(runner, SelfScheduling):
                self._loaded_executor = runner.load_executor(self.engines, options.reuse_prefixes, self._counters)
            else:
                self._loaded_executor = Scheduler(
                    self.engines.decoder,
                    self._tokens_per_step,
                    options.reuse_prefixes,
                    self._counters,
                    self._observe,
                    ahead=options.overlap and self.engines.device.type == "cuda",
                )
        return self._loaded_executor

    @property
    def busy(self) -> bool:
        """Whether a submitted request has not ended."""
        return bool(self._queue) or (self._loaded_executor is not None and self._loaded_executor.busy)

    @exclusive
    def step(self) -> list[NewToken]:
        """Start queued requests where slots are free, then run one step of every one that runs.

        Media that threads still load hold up nothing that can go on without them; where nothing can, it waits for the
        first that are loaded, the next deadline, or :meth:`interrupt`. Deadlines are looked at here. What goes wrong
        with a request, in an engine too, ends that request alone.
        """
        if not self.busy:
            return []
        began, executor, queued = self._clock(), self._executor(), len(self._queue)
        self._take_in()
        if not executor.busy and len(self._queue) == queued:  # else the caller is told of those that have ended
            with self._observe(Stage("wait")):
                waited = self._queue.wait_for_media()
            if waited:
                self._take_in()
        new = executor.step()
        for token in new:
            if token.sequence.output in self._listeners:
                number, events = self._listeners[token.sequence.output]
                events.append(Event(number, token.token, token.text, token.sequence.output, token.logprobs))
        self._counters.steps += 1
        self._counters.step_seconds += self._clock() - began
        return new

    @exclusive
    def cancel(self, output: Output) -> None:
        """End a request, queued or running, with ``finish_reason`` ``"cancelled"``; it keeps the tokens it has."""
        output.cancel()
        self._queue.drop_ended()
        if self._loaded_executor is not None:
            self._loaded_executor.cancel(output)

    @exclusive
    def close(self) -> None:
        """Cancel the queued requests and end the threads that load media, once those have finished what they are at.

        What runs can be stepped on, and new requests start new threads. A pipeline that nobody holds any longer ends
        its threads as well, without waiting for them.
        """
        self._queue.cancel_all()
        self._prefetcher.close()

    def counters(self) -> Counters:
        """What was done so far, and the present state; a copy that no longer changes. It waits for no step."""
        found = replace(
            self._counters,
            queued=len(self._queue),
            embedding_hits=self._cached_media.hits,
            embedding_misses=self._cached_media.misses,
            embedding_evictions=self._embeddings.evictions,
            embedding_bytes=self._embeddings.nbytes,
        )
        executor = self._loaded_executor
        if executor is not None:
            found.running = executor.running
            found.kept_prefix_tokens = executor.kept_tokens
            found.kv_cache_bytes = executor.cache_bytes
            found.kv_cache_usage = executor.cache_usage
        return found

    @exclusive
    def clear_caches(self) -> None:
        """Forget kept prefixes and vision embeddings; if nothing runs the key-value cache shrinks to its smallest."""
        self._embeddings.clear()
        if self._loaded_executor is not None:
            self._loaded_executor.forget()

    @exclusive
    def warm_up(self, image_sizes: Sequence[tuple[int, int]] = (), max_length: int | None = None) -> None:
        """Do now what the first requests would have to wait for; returns when it is done.

        Loads the decoder, reads prompts of padding, decodes with every number of slots, which captures the CUDA graphs
        where there are any, and embeds a blank image of each size; the log says how long it took. Requests that are
        under way are finished first, and what ended ones left in the key-value cache is forgotten. Counts and caches
        nothing.

        Args:
            image_sizes: width and height of images to expect, in pixels, as they come.
            max_length: most tokens of a prompt and its answer to make graphs for; by default all that the engine takes.

        Raises:
            LimitError: no such length, or an image of that size does not fit, and sizes are strict.
            MediaError: no such sizes, or one without pixels or above ``image_pixel_limit``.
            EngineError: the decoder does not load.
        """
        most = self.profile.max_seq_len
        longest = most if max_length is None else max_length
        if not 1 <= longest <= most:
            raise LimitError(f"max_length is {longest:,}; this engine takes 1 to {most:,} (--max-seq-len)")
        limits = ImageLimits(self.options.image_pixel_limit)
        try:
            sizes = [(index(width), index(height)) for width, height in image_sizes]
        except (TypeError, ValueError):
            raise MediaError("image_sizes is no list of sizes in whole pixels; give [(width, height), ...]") from None
        for width, height in sizes:
            check_pixels(width, height, "an image to warm up for", limits)
        began = time.perf_counter()
        while self.busy:
            self.step()
        self._executor().warm_up(min(self._tokens_per_step, self.profile.max_input_len, longest), longest)
        for width, height in sizes:
            self.embed_images([np.zeros((height, width, 3), dtype=np.uint8)])
        if self.engines.device.type == "cuda":
            torch.cuda.synchronize(self.engines.device)
        _logger.info("warmed up in %.1f s", time.perf_counter() - began)

    @exclusive
    def embed_images(self, images: Sequence[ImageSource], on_done: Callable[[int], None] | None = None) -> list[Tensor]:
        """Vision embeddings ``[tokens, hidden]`` of each image, raster order, any mix of sizes.

        They bypass the embedding cache, which serves images that come again.

        Args:
            images: as many as ``max_batch_size`` are decoded and embedded at a time.
            on_done: told how many are done, after each engine call.

        Raises:
            MediaError: no list, or an image cannot be read; named by its number, from 1.
            LimitError: an image does not fit the engine, and sizes are strict.
        """
        images, preprocessor = listed(images, "images", 4), self._media.preprocessor
        embeddings: list[Tensor] = []
        for first in range(0, len(images), self.profile.max_batch_size):
            group = images[first : first + self.profile.max_batch_size]
            loaded = [preprocessor.load_image(source, f"image {n}") for n, source in enumerate(group, start=first + 1)]
            with self._side.work(loaded) as ready:
                embeds = self._media.embed(loaded)[0]
            ready.wait(*embeds)
            embeddings += embeds
            if on_done is not None:
                on_done(len(embeddings))
        return embeddings

    def tokenize(self, request: Request) -> Prompt:
        """The prompt that the decoder would read, image and video tokens repeated; nothing is run or cached.

        Raises:
            PromptError: not a :class:`Request`, or the prompt is wrong.
            MediaError: an image or a video cannot be read.
            LimitError: the prompt is longer than the engines take.
        """
        self._check_request(request)
        with self._alone:
            found = self._preparer.find_media(request)
        media = self._preparer.load(*found)  # while others' steps go on
        with self._alone:
            return self._preparer.prompt(request, media)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is, without the chat template; ``Request.prompt`` takes them. It waits for no step.

        Special tokens that it spells are plain text, unless ``allow_special_tokens``.

        Raises:
            PromptError: a lone surrogate, or the tokenizer does not take it.
            LimitError: it has more characters than the engines' longest prompt stands for.
        """
        return self._prompts.encode(text)

    @exclusive
    def hidden_states(self, requests: Request | Sequence[Request]) -> list[Tensor]:
        """Decoder hidden states ``[S, hidden]`` of each prompt, after the final norm, image tokens included.

        Raises:
            PromptError: not :class:`Request`.
            Qwen2VLError: what is wrong with a request, named by its number, from 1.
        """
        requests = [requests] if isinstance(requests, Request) else requests
        for request in requests:
            self._check_request(request)
        _ = self.engines.decoder  # refused where the backend shows nothing of it
        while self.busy:  # the slots are needed
            self.step()
        executor = self._executor()
        states: list[Tensor] = []
        for first in range(0, len(requests), executor.slots):
            group = [
                self._prepare_named(request, f"request {number}: ")
                for number, request in enumerate(requests[first : first + executor.slots], start=first + 1)
            ]
            with self._side.work([item.media for item in group]) as ready:
                self._embed(group)
            for item in group:
                item.ready = ready
            states += executor.hidden_states(group)
        return states

    def _events(
        self,
        requests: Request | Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams] | None,
        outputs: list[Output],
    ) -> Iterator[Event]:
        requests = [requests] if isinstance(requests, Request) else requests
        if not isinstance(requests, Sequence):
            raise PromptError(f"requests is a {type(requests).__name__}; give a Request, or a list of them")
        settings = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(requests)
        if len(settings) != len(requests):
            raise SamplingError(
                f"{len(requests)} requests came with {len(settings)} SamplingParams; give one or as many"
            )
        events: deque[Event] = deque()
        ended = 0  # of those in front
        try:
            with self._alone:  # no step of another thread between a request and its listener
                for number, (request, setting) in enumerate(zip(requests, settings, strict=True)):
                    outputs.append(self.submit(request, setting))
                    self._listeners[outputs[-1]] = number, events
            while True:
                with self._alone:  # another thread's step ends a request before it tells of its last token
                    while ended < len(outputs) and outputs[ended].finished:
                        ended += 1
                while events:
                    yield events.popleft()
                if ended == len(outputs):
                    return
                self.step()
        finally:
            for output in outputs:
                if not output.finished:
                    self.cancel(output)
                del self._listeners[output]

    def _take_in(self) -> None:
        """Prepare queued requests whose turn is near and give them the free slots."""
        executor = self._executor()
        self._queue.expire()
        self._queue.prepare(executor.free_slots, executor.slots)
        self._start(self._queue.next_group(executor.free_slots, self.profile.max_batch_size, self._tokens_per_step))

    def _start(self, group: Sequence[RunningSequence]) -> None:
        """Embed requests and hand them to the executor. Where that fails for all together each gets a try alone."""
        if not group:
            return
        media = [(each.output, medium.key) for each in group for medium in each.media]
        stage = Stage("embed", [output for output, _ in media], media=[key for _, key in media])
        try:
            with self._side.work([each.media for each in group]) as ready, self._observe(stage):
                times = self._embed(group)
        except Exception as error:
            if len(group) > 1:
                for sequence in group:
                    self._start([sequence])
                return
            self._queue.remove(group[0])
            group[0].output.fail(named(error, "the vision engine"))
            return
        for sequence in group:
            sequence.ready = ready
            if sequence.media:
                sequence.output.timings.preprocess += times.preprocess
                sequence.output.timings.vision = times.vision
            self._queue.remove(sequence)
            if sequence.features == "image_features":
                ready.wait(*sequence.found)
                sequence.finish()
            else:
                self._executor().add(sequence)

    def _embed(self, group: Sequence[RunningSequence]) -> StageTimes:
        """Make what a decoder reads of each prompt; their media are embedded together. Returns the time of that."""
        executor = self._executor()
        seen = [
            [] if executor.takes_pixels and sequence.features != "image_features" else sequence.media
            for sequence in group
        ]
        embeds, times = self._cached_media.embed([medium for media in seen for medium in media])
        following = iter(embeds)
        for sequence, media in zip(group, seen, strict=True):
            own = [*islice(following, len(media))]
            if sequence.features == "image_features":
                sequence.found = own
            else:
                sequence.inputs_embeds = executor.inputs_embeds(sequence, own)
        return times

    def _check_request(self, request: Request) -> None:
        if not isinstance(request, Request):
            raise PromptError(f"a {type(request).__name__} is no request; give Request(prompt, images=[...])")
        if request.adapter is not None and request.adapter not in self.engines.adapters:
            there = ", ".join(self.engines.adapters) or "none (PipelineOptions(lora_modules={name: folder}))"
            raise PromptError(f"there is no adapter {request.adapter!r:.60}; this pipeline has {there}")

    def _prepare_named(self, request: Request, name: str) -> RunningSequence:
        try:
            media = self._preparer.load(*self._preparer.find_media(request))
            return self._preparer.prepare(replace(request, features=None), Sampling(max_tokens=0), Output(), media)
        except Qwen2VLError as error:
            raise type(error)(f"{name}{error}") from None
