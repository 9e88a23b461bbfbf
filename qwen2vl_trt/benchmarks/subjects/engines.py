"""Our engines as subjects, through the runners' protocol: whatever backend has a runner can be measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen2vl_trt.accuracy.recorder import in_patch_order, pack
from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.runtime.backends.runners import Engines, Step, VisionRunner, open_engines
from qwen2vl_trt.runtime.inputs.jpeg_decoder import check_gpu_decoding
from qwen2vl_trt.runtime.observer import Observer, unobserved
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.preprocessing.preprocessor import Decode, PackedPixels, Preprocessor, PreprocessorSettings
from qwen2vl_trt.runtime.request import Output, Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.windows import WindowLayout, window_layout

from .shapes import Case
from .stages import STAGES_OF_A_REQUEST, StageClock
from .subject import Sample, Subject, Turn, timed
from .timeline import Timeline

PROMPT = "What is in the image?"


@dataclass(frozen=True)
class EngineOptions:
    """How to run an engine folder.

    Attributes:
        folder: of the engines.
        device: as ``--device`` takes it.
        streams: vision calls at a time.
        cuda_graph: capture the vision call once and replay it.
        decode: where the pipeline decodes JPEG files.
    """

    folder: Path
    device: str | None = None
    streams: int = 1
    cuda_graph: bool = False
    decode: Decode = "cpu"


class EngineSubject(Subject):
    """Runs ``engines``: those given, or else opened from the folder."""

    def __init__(self, options: EngineOptions, engines: Engines | None = None) -> None:
        self._options = options
        self.engines = engines or open_engines(options.folder, options.device)
        self._config = self.engines.checkpoint.config
        manifest = self.engines.manifest
        self.name = f"{manifest.backend} {manifest.precision}"
        super().__init__(self.engines.device)


class ProcessorSubject(EngineSubject):
    """Decoded images in the host's memory to the vision engine's pixels, written over the last ones, as a pipeline has
    it do."""

    def load(self, case: Case) -> None:
        settings = PreprocessorSettings.from_folder(self.engines.checkpoint.folder)
        self._preprocessor = Preprocessor(self._config.vision, settings, self.device, self.engines.dtype)
        self._images, self._case = pixels_of(case, self.device), case
        self._memory = torch.empty_like(self._preprocessor.preprocess(self._images).pixel_values).view(-1)

    def iterate(self, count: int) -> list[Sample]:
        return [self._call() for _ in range(count)]

    def output(self) -> Tensor:
        packed = self._preprocess(self._images)
        _, height, width = self._case.grids[-1]
        return in_patch_order(packed.pixel_values, packed.layout, self._config.vision)[-height * width :]

    def _preprocess(self, images: list[Tensor]) -> PackedPixels:
        return self._preprocessor.preprocess(images, out=self._memory)

    def _call(self) -> Sample:
        return timed(self.device, lambda: self._images, self._preprocess, lambda packed: packed)[1]


class VisionSubject(EngineSubject):
    """The vision engine alone: pixels that are ready to embeddings."""

    def load(self, case: Case) -> None:
        self._layout = window_layout(case.grids, self._config.vision)
        patches = patches_of(case, self._config.vision.qwen2_vl_dim, self.engines.dtype)
        pixels = pack(patches, self._layout, self._config.vision)
        pixels = pixels.pin_memory() if self.device.type == "cuda" else pixels
        graph = self._options.cuda_graph
        self._calls = [
            _VisionCall(runner, pixels, self._layout, self.device, graph, case.on_device) for runner in self._runners
        ]

    def output(self) -> Tensor:
        return self._calls[0].run()[0][-self._layout.tokens_per_item[-1] :]

    @cached_property
    def _runners(self) -> list[VisionRunner]:
        """One a stream. A TensorRT runner owns an execution context, which one stream at a time may use."""
        others = range(self._options.streams - 1)
        if not self.engines.backend.plans:
            return [self.engines.vision] * self._options.streams
        return [self.engines.vision, *(self.engines.runner.load_vision(self.engines) for _ in others)]

    def iterate(self, count: int) -> list[Sample]:
        if len(self._calls) == 1:
            return [self._calls[0].run()[1] for _ in range(count)]
        with ThreadPoolExecutor(len(self._calls)) as pool:
            done = [pool.submit(call.in_own_stream, count) for call in self._calls]
            return [sample for future in done for sample in future.result()]


class _VisionCall:
    """One stream's call of the vision engine."""

    def __init__(
        self,
        runner: VisionRunner,
        pixels: Tensor,
        layout: WindowLayout,
        device: torch.device,
        cuda_graph: bool,
        stays: bool,
    ) -> None:
        self._pixels, self._device, self._stays = pixels, device, stays
        self._on_device = pixels.to(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._compute: Callable[[Tensor], Tensor] = lambda pixels: runner(pixels, layout)
        if cuda_graph:
            self._compute = _captured(runner, self._on_device, layout, device)

    def run(self) -> tuple[Tensor, Sample]:
        """Embeddings, and what the call took."""
        return timed(self._device, self._upload, self._compute, self._download)

    def in_own_stream(self, count: int) -> list[Sample]:
        if self._stream is None:
            return [self.run()[1] for _ in range(count)]
        with torch.cuda.stream(self._stream):
            return [self.run()[1] for _ in range(count)]

    def _upload(self) -> Tensor:
        if self._stays or self._stream is None:
            return self._on_device
        return self._on_device.copy_(self._pixels, non_blocking=True)

    def _download(self, embeds: Tensor) -> Tensor:
        return embeds if self._stays else embeds.to("cpu")


def _captured(
    runner: VisionRunner, pixels: Tensor, layout: WindowLayout, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The call as a CUDA graph, which reads ``pixels`` where it lies."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):  # the layout goes to the device and libraries choose their kernels before the capture
            runner(pixels, layout)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        embeds = runner(pixels, layout)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return embeds

    return replay


class DecoderSubject(EngineSubject):
    """The decoder engine alone, greedy: prompts one after the other, each in its own slot, then all rows together."""

    def load(self, case: Case) -> None:
        vocabulary = self.engines.checkpoint.config.text.vocab_size
        generator = torch.Generator().manual_seed(0)
        self._prompts = torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator).tolist()
        self._case = case
        self._decoder = self.engines.decoder

    def iterate(self, count: int) -> list[Sample]:
        return [self._answer() for _ in range(count)]

    def _answer(self) -> Sample:
        self._decoder.reset()
        sample: Sample = {"prefill": [], "time_to_first_token": [], "time_between_tokens": []}
        tokens = []
        began = last = time.perf_counter()
        for slot, prompt in enumerate(self._prompts):
            tokens.append(self._prefill(slot, prompt))
            now = time.perf_counter()
            sample["prefill"].append(now - last)
            sample["time_to_first_token"].append(now - began)
            last = now
        for written in range(self._case.prompt, self._case.prompt + self._case.generate - 1):
            tokens, step = self._decode(tokens, written)
            now = time.perf_counter()
            sample["time_between_tokens"].append(now - last)
            last = now
            for name, seconds in step.items():
                if name != "latency":
                    sample.setdefault(name, []).extend(seconds)
        sample["latency"] = [last - began]
        return sample

    def _prefill(self, slot: int, prompt: list[int]) -> int:
        embeds = self._decoder.embed(prompt)[None]
        positions = torch.arange(len(prompt)).expand(3, 1, -1)
        size = PipelineOptions().max_num_tokens
        for first in range(0, len(prompt), size):  # in chunks, as the scheduler does
            chunk = slice(first, first + size)
            step = self._decoder.step(slot, embeds[:, chunk], positions[:, :, chunk], [first])
        return int(step.logits.argmax())

    def _decode(self, tokens: list[int], written: int) -> tuple[list[int], Sample]:
        batch = len(tokens)
        positions = torch.full((3, batch, 1), written)

        def compute(embeds: Tensor) -> Step:
            return self._decoder.step(0, embeds, positions, [written] * batch)

        return timed(
            self.device,
            lambda: self._decoder.embed(tokens)[:, None],
            compute,
            lambda step: step.logits.argmax(dim=-1).tolist(),
        )


class HiddenStatesSubject(EngineSubject):
    """Images and a question to the decoder's hidden states, ``batch`` samples in one call."""

    def load(self, case: Case) -> None:
        images = torch.stack(pixels_of(case, self.device))[:, None]  # [B, cameras, 3, H, W]
        requests = Request.from_batch(images, [PROMPT] * case.batch)
        self._call = partial(forgetful_pipeline(self.engines).hidden_states, requests)

    def iterate(self, count: int) -> list[Sample]:
        return [
            timed(self.device, lambda: None, lambda _: self._call(), lambda states: states)[1] for _ in range(count)
        ]

    def output(self) -> Tensor:
        return self._call()[-1]


class PipelineSubject(EngineSubject):
    """The whole pipeline: encoded images and a question to an answer, ``batch`` requests at a time, greedy."""

    def __init__(self, options: EngineOptions, engines: Engines | None = None) -> None:
        super().__init__(options, engines)
        # To know a stage's time the host waits for the GPU at its end, and then nothing overlaps.
        self._waits = self.device.type == "cuda"

    def load(self, case: Case) -> None:
        self._clock = StageClock(self.device)
        self._watched = self._ready(case, self._clock, case.batch)
        self._plain = self._ready(case, unobserved, case.batch) if self._waits else self._watched

    def _ready(self, case: Case, observe: Observer, different: int) -> _Pipeline:
        return _Pipeline(forgetful_pipeline(self.engines, self._options.decode, observe), case, different)

    def run(self, count: int) -> Turn:
        self._clock.seconds.clear()
        turn = super().run(count)
        seconds = turn.seconds
        if self._waits:
            began = time.perf_counter()
            self._watched.answer(count * self._watched.batch)
            seconds = time.perf_counter() - began
        stages = {stage: self._clock.seconds[stage] for stage in STAGES_OF_A_REQUEST}
        stages["host"] = seconds - sum(stages.values())
        return replace(turn, stages={stage: spent * turn.seconds / seconds for stage, spent in stages.items()})

    def iterate(self, count: int) -> list[Sample]:
        return [_request_sample(output) for output in self._plain.answer(count * self._plain.batch)]

    def prompt_tokens(self) -> int:
        """Of a request of the case that is loaded."""
        return self._plain.answer(1)[0].prompt_tokens

    def trace(self, case: Case) -> dict[str, Any]:
        """``2 * batch`` requests that arrive together: some wait where slots are fewer. Before it, a warm-up."""
        timeline = Timeline(self.device)
        pipeline = self._ready(case, timeline, 2 * case.batch)  # no two alike, so that an image says whose it is
        pipeline.answer(case.batch)
        timeline.clear()
        pipeline.batch *= 2
        timeline.requests = pipeline.answer(pipeline.batch)
        return timeline.as_dict()


class _Pipeline:
    """A pipeline and the requests of a case."""

    def __init__(self, pipeline: Pipeline, case: Case, different: int) -> None:
        self._pipeline, self.batch = pipeline, case.batch
        self._requests = different_requests(case.sizes, different)
        self._params = SamplingParams(max_tokens=case.generate, ignore_eos=True)

    def answer(self, waiting: int) -> list[Output]:
        """So many requests, ``batch`` at a time; as one ends, the next begins."""
        running: list[Output] = []
        done: list[Output] = []
        while waiting or running:
            while waiting and len(running) < self.batch:
                running.append(self._pipeline.submit(self._requests[waiting % len(self._requests)], self._params))
                waiting -= 1
            self._pipeline.step()
            done += [output for output in running if output.finished]
            running = [output for output in running if not output.finished]
        return done


def different_requests(sizes: Sequence[tuple[int, int]], count: int) -> list[Request]:
    """Of the same sizes; one image may be embedded once for several requests of a batch."""
    images = len(sizes)
    return [
        Request(PROMPT, [jpeg(size, number * images + place) for place, size in enumerate(sizes)])
        for number in range(count)
    ]


def forgetful_pipeline(engines: Engines, decode: Decode = "cpu", observe: Observer = unobserved) -> Pipeline:
    """One that keeps nothing of a request for the next: a benchmark's requests are all alike, a load's are not.

    Its answers are greedy whatever the checkpoint says, as the other contenders' are.
    """
    options = PipelineOptions(decode=decode, generation_config="none", reuse_prefixes=False, embedding_cache_bytes=0)
    return Pipeline(engines, options, observe=observe)


def _request_sample(output: Output) -> Sample:
    _ = output.text  # raises what went wrong
    return {"latency": [output.timings.total], "time_to_first_token": [output.timings.time_to_first_token]}


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """A picture of smooth noise as a JPEG file, the same for every contender."""
    buffer = BytesIO()
    picture(size, seed).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels_of(case: Case, device: torch.device) -> list[Tensor]:
    """A case's images, ``[3, H, W]`` uint8, on the device where the case says so."""
    arrays = (np.array(picture(size, seed)) for seed, size in enumerate(case.sizes * case.batch))
    place = device if case.on_device else "cpu"
    return [torch.from_numpy(array).permute(2, 0, 1).contiguous().to(place) for array in arrays]


def patches_of(case: Case, width: int, dtype: torch.dtype) -> Tensor:
    """Random patches ``[P, width]`` of a case's images, in Transformers' order."""
    return torch.randn(case.patches, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of smooth noise, (height, width) in pixels."""
    height, width = size
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def check_options(options: EngineOptions, stages: tuple[str, ...]) -> None:
    """Refuse what these engines cannot do, with the reason.

    Raises:
        EngineError: the engines cannot run here.
        BenchmarkError: streams, a CUDA graph or JPEG files where there are none.
        MediaError: JPEG files to be decoded on a GPU, and the engines run on none.
        MissingDependencyError: nvImageCodec for that is not installed.
    """
    engines = open_engines(options.folder, options.device)
    backend = engines.manifest.backend
    if options.streams > 1 and stages != ("vision",):
        raise BenchmarkError(
            f"--streams {options.streams}: only the vision engine runs several calls at once (bench vision); the"
            " decoder has one cache, whose slots are its concurrency (--shapes batch:N)"
        )
    if options.decode == "gpu":
        if "pipeline" not in stages:
            raise BenchmarkError(f"--decode gpu: bench {' '.join(stages)} reads no JPEG file; bench pipeline does")
        check_gpu_decoding(engines.device)
    if not options.cuda_graph:
        return
    if engines.device.type != "cuda":
        raise BenchmarkError(f"--use-cuda-graph needs a GPU; these engines run on {engines.device}")
    if stages != ("vision",):
        raise BenchmarkError(
            "--use-cuda-graph is for the vision engine (bench vision); where a decoder runner can, it captures its own"
        )
    if backend != "torch" or options.streams > 1:
        raise BenchmarkError(
            f"--use-cuda-graph is for the torch backend in one stream; {backend} with {options.streams} streams has no"
            " capture here"
        )
