"""Our engines' workloads, through the runners' protocol and the pipeline: whatever backend has them can be measured."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.accuracy.recorder import in_patch_order, pack
from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.runtime.backends.runners import Engines, open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.inputs.jpeg_decoder import check_gpu_decoding
from qwen2vl_trt.runtime.observer import Observer, Stage, unobserved
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.preprocessing.preprocessor import Decode, PackedPixels, Preprocessor, PreprocessorSettings
from qwen2vl_trt.runtime.request import Output, Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams
from qwen2vl_trt.windows import window_layout

from .cases import PROMPT, Case
from .roofline import synchronize
from .timeline import Timeline
from .workload import Sample, System, Turn, Workload, timed

PIPELINE_STAGES = ("preprocess", "vision", "prefill", "decode", "sampling", "host")
"""``preprocess`` is what the step does or waits for of it, ``host`` all the rest: chat template, tokens to text,
scheduling, embeddings."""


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

    def check(self, stages: tuple[str, ...]) -> None:
        """Refuse what these engines cannot do, with the reason.

        Raises:
            EngineError: the engines cannot run here.
            BenchmarkError: streams, a CUDA graph or JPEG files where there are none.
            MediaError: JPEG files to be decoded on a GPU, and the engines run on none.
            MissingDependencyError: nvImageCodec for that is not installed.
        """
        engines = open_engines(self.folder, self.device)
        backend = engines.manifest.backend
        if self.streams > 1 and stages != ("vision",):
            raise BenchmarkError(
                f"--streams {self.streams}: only the vision engine runs several calls at once (bench vision); the"
                " decoder has one cache, whose slots are its concurrency (--shapes batch:N)"
            )
        if self.decode == "gpu":
            if "pipeline" not in stages:
                raise BenchmarkError(f"--decode gpu: bench {' '.join(stages)} reads no JPEG file; bench pipeline does")
            check_gpu_decoding(engines.device)
        if self.cuda_graph and engines.device.type != "cuda":
            raise BenchmarkError(f"--use-cuda-graph needs a GPU; these engines run on {engines.device}")
        if self.cuda_graph and (stages != ("vision",) or backend != "torch" or self.streams > 1):
            raise BenchmarkError(
                "--use-cuda-graph is for bench vision, the torch backend and one stream; a decoder runner that can"
                " captures its own graphs"
            )


class EngineSystem(System):
    """An engine folder; ``preload`` loads both engines at once, so that they count as what was there before a case."""

    def __init__(self, options: EngineOptions, preload: bool = False) -> None:
        self.options = options
        self.engines = open_engines(options.folder, options.device)
        self.name = f"{self.engines.manifest.backend} {self.engines.manifest.precision}"
        super().__init__(self.engines.device)
        if preload:
            _ = self.engines.vision, self.engines.decoder

    def make(self, stage: str) -> EngineWorkload:
        return _WORKLOADS[stage](self.engines, self.options)

    def prompt_tokens(self) -> int:
        """Of a request of the pipeline case that is loaded."""
        return self.workload.answer(1)[0].prompt_tokens

    def trace(self, case: Case) -> dict[str, Any]:
        """A timeline of ``2 * batch`` requests that arrive together: some wait where slots are fewer."""
        timeline = Timeline(self.device)
        requests = _Requests(self.engines, self.options, case, timeline, 2 * case.batch)
        requests.answer(case.batch, case.batch)  # a warm-up
        timeline.clear()
        timeline.requests = requests.answer(2 * case.batch, 2 * case.batch)
        return timeline.as_dict()


class EngineWorkload(Workload):
    """Runs one stage of opened engines."""

    def __init__(self, engines: Engines, options: EngineOptions) -> None:
        self.engines, self.options, self.device = engines, options, engines.device
        self._config = engines.checkpoint.config


class _Processor(EngineWorkload):
    """Decoded images in the host's memory to the vision engine's pixels, written over the last ones."""

    def load(self, case: Case) -> None:
        settings = PreprocessorSettings.from_folder(self.engines.checkpoint.folder)
        self._preprocessor = Preprocessor(self._config.vision, settings, self.device, self.engines.dtype)
        self._images, self._case = case.make_images(self.device), case
        self._memory = torch.empty_like(self._preprocessor.preprocess(self._images).pixel_values).view(-1)

    def sample(self) -> Sample:
        return self._call()[1]

    def output(self) -> Tensor:
        packed: PackedPixels = self._call()[0]
        _, height, width = self._case.grids[-1]
        return in_patch_order(packed.pixel_values, packed.layout, self._config.vision)[-height * width :]

    def _call(self) -> tuple[Any, Sample]:
        process = partial(self._preprocessor.preprocess, out=self._memory)
        return timed(self.device, lambda: self._images, process, lambda packed: packed)


class _Vision(EngineWorkload):
    """The vision engine alone: pixels that are ready to embeddings."""

    def load(self, case: Case) -> None:
        self._layout, self._stays = window_layout(case.grids, self._config.vision), case.on_device
        patches = case.make_patches(self._config.vision.qwen2_vl_dim, self.engines.dtype)
        self._pixels = pack(patches, self._layout, self._config.vision)
        if self.device.type == "cuda":
            self._pixels = self._pixels.pin_memory()
        self._streams = [self._stream(number) for number in range(self.options.streams)]

    def _stream(self, number: int) -> Callable[[], tuple[Any, Sample]]:
        """A call on memory of its own. A TensorRT runner owns an execution context, which one stream at a time uses."""
        shared = number == 0 or not self.engines.backend.plans
        runner = self.engines.vision if shared else self.engines.runner.load_vision(self.engines)
        pixels = self._pixels.to(self.device)
        copied = self.device.type == "cuda" and not self._stays

        def embed(given: Tensor) -> Tensor:
            return runner(given, self._layout)

        return partial(
            timed,
            self.device,
            lambda: pixels.copy_(self._pixels, non_blocking=True) if copied else pixels,
            _captured(embed, pixels) if self.options.cuda_graph else embed,
            lambda embeds: embeds if self._stays else embeds.to("cpu"),
        )

    def output(self) -> Tensor:
        return self._streams[0]()[0][-self._layout.tokens_per_item[-1] :]

    def iterate(self, count: int) -> list[Sample]:
        if len(self._streams) == 1:  # here: a new thread has OpenMP threads of its own to start
            return [self._streams[0]()[1] for _ in range(count)]

        def run(call: Callable[[], tuple[Any, Sample]]) -> list[Sample]:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            with torch.cuda.stream(stream):  # None: as it is
                return [call()[1] for _ in range(count)]

        with ThreadPoolExecutor(len(self._streams)) as pool:
            return [sample for samples in pool.map(run, self._streams) for sample in samples]


def _captured(compute: Callable[[Tensor], Tensor], pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """The call as a CUDA graph, which reads ``pixels`` where it lies."""
    stream = torch.cuda.Stream(pixels.device)
    with torch.cuda.stream(stream):
        for _ in range(3):  # the layout goes to the device and libraries choose their kernels before the capture
            compute(pixels)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        embeds = compute(pixels)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return embeds

    return replay


class _Decoder(EngineWorkload):
    """The decoder engine alone, greedy: prompts one after the other, each in its own slot, then all rows together."""

    def load(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.prompt)
        self._prompts = torch.randint(0, self._config.text.vocab_size, shape, generator=generator).tolist()
        self._case, self._decoder = case, self.engines.decoder

    def sample(self) -> Sample:
        self._decoder.reset()
        self._decoder.cache.allot(self._case.batch, self._case.prompt + self._case.generate)
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
            for name in step.keys() - {"latency"}:
                sample.setdefault(name, []).extend(step[name])
        sample["latency"] = [last - began]
        return sample

    def _prefill(self, slot: int, prompt: list[int]) -> int:
        embeds = self._decoder.embed(prompt)
        positions = torch.arange(len(prompt)).expand(3, -1)
        size = PipelineOptions().tokens_per_step(self.device)
        for first in range(0, len(prompt), size):  # in chunks, as the scheduler does
            part = slice(first, first + size)
            step = self._decoder.step([Chunk(slot, first, len(embeds[part]))], embeds[part], positions[:, part])
        return int(step.logits.argmax())

    def _decode(self, tokens: list[int], written: int) -> tuple[list[int], Sample]:
        batch = len(tokens)
        positions = torch.full((3, batch), written)
        chunks = [Chunk(slot, written, 1) for slot in range(batch)]
        return timed(
            self.device,
            lambda: self._decoder.embed(tokens),
            lambda embeds: self._decoder.step(chunks, embeds, positions),
            lambda step: step.logits.argmax(dim=-1).tolist(),
        )


class _HiddenStates(EngineWorkload):
    """Images and a question to the decoder's hidden states, ``batch`` samples in one call."""

    def load(self, case: Case) -> None:
        images = torch.stack(case.make_images(self.device))[:, None]  # [B, cameras, 3, H, W]
        requests = Request.from_batch(images, [PROMPT] * case.batch)
        self._call = partial(_pipeline(self.engines).hidden_states, requests)

    def sample(self) -> Sample:
        return timed(self.device, lambda: None, lambda _: self._call(), lambda states: states)[1]

    def output(self) -> Tensor:
        return self._call()[-1]


class _Pipeline(EngineWorkload):
    """The whole pipeline: JPEG files and a question to an answer, ``batch`` requests at a time, greedy."""

    def __init__(self, engines: Engines, options: EngineOptions) -> None:
        super().__init__(engines, options)
        # To know a stage's time the host waits for the GPU at its end, and then nothing overlaps.
        self._waits = self.device.type == "cuda"

    def load(self, case: Case) -> None:
        self.clock, self._batch = StageClock(self.device), case.batch
        self._observed = _Requests(self.engines, self.options, case, self.clock)
        self._plain = _Requests(self.engines, self.options, case) if self._waits else self._observed

    def answer(self, count: int) -> list[Output]:
        return self._plain.answer(count, self._batch)

    def iterate(self, count: int) -> list[Sample]:
        return [
            {"latency": [output.timings.total], "time_to_first_token": [output.timings.time_to_first_token]}
            for output in self.answer(count * self._batch)
        ]

    def run(self, count: int) -> Turn:
        self.clock.seconds.clear()
        turn = super().run(count)
        seconds = turn.seconds
        if self._waits:
            began = time.perf_counter()
            self._observed.answer(count * self._batch, self._batch)
            seconds = time.perf_counter() - began
        stages = {stage: self.clock.seconds[stage] for stage in PIPELINE_STAGES}
        stages["host"] = seconds - sum(stages.values())
        return replace(turn, stages={stage: spent * turn.seconds / seconds for stage, spent in stages.items()})


class StageClock:
    """An observer that adds up the seconds of each stage, waiting for the device at the end of each.

    Only those of the thread that it was made on: what others load meanwhile costs what that one waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._thread = threading.get_ident()

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        began = time.perf_counter()
        yield
        synchronize(self._device)
        name = "preprocess" if stage.name in ("load", "wait") else stage.name
        self.seconds[name] += time.perf_counter() - began


class _Requests:
    """A pipeline and requests of a case, ``different`` from each other: an image may be embedded once for several."""

    def __init__(
        self,
        engines: Engines,
        options: EngineOptions,
        case: Case,
        observe: Observer = unobserved,
        different: int | None = None,
    ) -> None:
        self._pipeline = _pipeline(engines, options.decode, observe)
        self._requests = [Request(PROMPT, case.make_files(number)) for number in range(different or case.batch)]
        self._params = SamplingParams(max_tokens=case.generate, ignore_eos=True)

    def answer(self, waiting: int, batch: int) -> list[Output]:
        """So many requests, ``batch`` at a time; as one ends, the next begins."""
        running: list[Output] = []
        done: list[Output] = []
        while waiting or running:
            while waiting and len(running) < batch:
                running.append(self._pipeline.submit(self._requests[waiting % len(self._requests)], self._params))
                waiting -= 1
            self._pipeline.step()
            done += [output for output in running if output.finished]
            running = [output for output in running if not output.finished]
        for output in done:
            _ = output.text  # raises what went wrong
        return done


def _pipeline(engines: Engines, decode: Decode = "cpu", observe: Observer = unobserved) -> Pipeline:
    """One that keeps nothing of a request for the next: a benchmark's requests are all alike, a load's are not.

    Its answers are greedy whatever the checkpoint says, as Transformers' are here.
    """
    options = PipelineOptions(decode=decode, generation_config="none", reuse_prefixes=False, embedding_cache_bytes=0)
    return Pipeline(engines, options, observe=observe)


_WORKLOADS: dict[str, type[EngineWorkload]] = {
    "processor": _Processor,
    "vision": _Vision,
    "decoder": _Decoder,
    "hidden states": _HiddenStates,
    "pipeline": _Pipeline,
}
