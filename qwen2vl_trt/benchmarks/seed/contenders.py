"""Who runs the rows of ``bench seed``: our engines and Transformers, each in a process of its own, one after the other.

Both get the same pixels, patches, prompts and files. A row that fails says why and leaves the others alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen2vl_trt.accuracy.recorder import in_patch_order, pack
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor, PreprocessorSettings
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.runtime.sampler import SamplingParams
from qwen2vl_trt.windows import window_layout

from ..floors.rates import synchronize
from ..subjects.engines import PROMPT, DecoderSubject, EngineOptions, different_requests, forgetful_pipeline, picture
from ..subjects.shapes import Case
from ..subjects.transformers import TransformersDecoder, TransformersPipeline, load_model
from ..workers import forget_peak, peak_bytes
from .rows import Row

BATCHED, ONE = "batched", "one at a time"
_SECONDS, _RUNS = 2.0, 5  # of a way, whichever is reached first; on a CPU a first run that is longer is the only one
_ALONE = 4  # requests of the row of many, where they run one at a time


_Calls = tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True)
class Way:
    """A call that does ``items`` of a row's items. If it returns a float, that is its seconds."""

    call: Callable[[], object]
    items: int


@dataclass(frozen=True)
class Timing:
    """What a way took.

    Attributes:
        seconds: of an item, the median of ``runs``; None where it failed.
        runs: that were counted.
        peak: bytes at most meanwhile: of torch's memory on a GPU, of the process on a CPU.
        rest: bytes before it: weights, and libraries on a CPU.
        error: why it failed.
    """

    seconds: float | None
    runs: int = 0
    peak: int = 0
    rest: int = 0
    error: str = ""


@dataclass(frozen=True)
class Answer:
    """A row by one contender.

    Attributes:
        timings: by way.
        output: of the row's last item, FP32 ``[n, C]``, to compare; None where there is nothing to compare.
        error: why there is nothing at all, or no output.
    """

    timings: dict[str, Timing] = field(default_factory=dict)
    output: np.ndarray | None = None
    error: str = ""


class Contender(ABC):
    """Runs rows."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = torch.device(device), dtype

    def run(self, row: Row) -> Answer:
        """Time every way of a row, and keep an output of it."""
        timings: dict[str, Timing] = {}
        output, problem = None, ""
        try:
            for how, way in self._ways(row).items():
                timings[how], result = self._time(way)
                if row.compared and output is None and result is not None:
                    output = self._output(row, result).float().cpu().numpy()
        except Exception as error:  # whatever it is, the other rows are not concerned
            problem = one_line(error)
        self._tidy()
        return Answer(timings, output, problem)

    def _time(self, way: Way) -> tuple[Timing, object]:
        """A way's timing and its last result."""
        self._tidy()
        seconds: list[float] = []
        try:
            rest = self._start_counting()
            first, result = self._once(way)
            if first > _SECONDS and self._device.type == "cpu":  # on a GPU it compiles, chooses kernels and captures
                seconds.append(first)
            while not seconds or (sum(seconds) < _SECONDS and len(seconds) < _RUNS):
                last, result = self._once(way)
                seconds.append(last)
        except Exception as error:
            return Timing(None, error=one_line(error)), None
        return Timing(float(np.median(seconds)) / way.items, len(seconds), self._peak(), rest), result

    def _once(self, way: Way) -> tuple[float, object]:
        synchronize(self._device)
        began = time.perf_counter()
        result = way.call()
        synchronize(self._device)
        return result if isinstance(result, float) else time.perf_counter() - began, result

    def _start_counting(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        forget_peak()
        return peak_bytes()

    def _peak(self) -> int:
        cuda = self._device.type == "cuda"
        return torch.cuda.max_memory_allocated(self._device) if cuda else peak_bytes()

    def _tidy(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pictures(self, row: Row) -> list[Tensor]:
        """``[3, H, W]`` uint8 on the device."""
        arrays = (np.array(picture(size, seed)) for seed, size in enumerate(row.sizes * row.batch))
        return [torch.from_numpy(array).permute(2, 0, 1).contiguous().to(self._device) for array in arrays]

    def _patches(self, row: Row) -> Tensor:
        """Random ``[P, qwen2_vl_dim]`` of all images or frames in Transformers' order, in the model's type."""
        generator = torch.Generator().manual_seed(0)
        count = sum(t * h * w for t, h, w in row.grids)
        return torch.randn(count, 1176, generator=generator).to(self._dtype).to(self._device)

    @abstractmethod
    def _ways(self, row: Row) -> dict[str, Way]: ...

    @abstractmethod
    def _output(self, row: Row, result: Any) -> Tensor:
        """Of the row's last item, from the first way's result."""


class Ours(Contender):
    """Our engines; everything in one call."""

    def __init__(self, folder: Path, device: str) -> None:
        self._engines = open_engines(folder, device)
        super().__init__(device, self._engines.dtype)
        self._options = EngineOptions(folder, device)
        self._config = self._engines.checkpoint.config.vision
        _ = self._engines.vision, self._engines.decoder  # loaded here: a row's memory is counted from there

    def prompt_tokens(self, row: Row) -> int:
        """Of a sample or a request of the row, image included."""
        return len(forgetful_pipeline(self._engines).hidden_states([Request(PROMPT, self._pictures(row)[:1])])[0])

    def _ways(self, row: Row) -> dict[str, Way]:
        if row.kind == "decode":
            return {BATCHED: Way(self._decode(row), row.batch)}
        if row.kind == "requests":
            return {BATCHED: Way(self._requests(row), row.batch)}
        call = {"processor": self._processor, "vision": self._vision, "full model": self._full_model}[row.kind]
        return {BATCHED: Way(call(row), row.batch * len(row.sizes))}

    def _output(self, row: Row, result: Any) -> Tensor:
        if row.kind == "processor":
            last = row.grids[-1][1] * row.grids[-1][2]
            return in_patch_order(result.pixel_values, result.layout, self._config)[-last:]
        if row.kind == "vision":
            return result[-window_layout(row.grids, self._config).tokens_per_item[-1] :]
        return result[-1]

    def _processor(self, row: Row) -> Callable[[], Any]:
        """Writing over its last result, as the pipeline has it do."""
        settings = PreprocessorSettings.from_folder(self._engines.checkpoint.folder)
        preprocessor = Preprocessor(self._config, settings, self._device, self._dtype)
        images = self._pictures(row)
        memory = torch.empty_like(preprocessor.preprocess(images).pixel_values).view(-1)
        return lambda: preprocessor.preprocess(images, out=memory)

    def _vision(self, row: Row) -> Callable[[], Tensor]:
        layout = window_layout(row.grids, self._config)
        return partial(self._engines.vision, pack(self._patches(row), layout, self._config), layout)

    def _full_model(self, row: Row) -> Callable[[], list[Tensor]]:
        images = torch.stack(self._pictures(row))[:, None]  # [B, cameras, 3, H, W]
        return partial(
            forgetful_pipeline(self._engines).hidden_states, Request.from_batch(images, [PROMPT] * row.batch)
        )

    def _decode(self, row: Row) -> Callable[[], float]:
        subject = DecoderSubject(self._options, self._engines)
        subject.load(_decoder_case(row))
        return lambda: _between_tokens(subject.iterate(1)[0])

    def _requests(self, row: Row) -> Callable[[], object]:
        pipeline, params = forgetful_pipeline(self._engines), SamplingParams(max_tokens=row.generate, ignore_eos=True)
        requests = different_requests(row.sizes, row.batch)
        return lambda: [output.text for output in pipeline.generate(requests, params)]  # raises what went wrong


class Transformers(Contender):
    """Transformers: one at a time, and its own batch."""

    def __init__(self, checkpoint: Path, device: str, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self._checkpoint = checkpoint
        self._model = load_model(checkpoint, dtype, self._device)
        from transformers import AutoProcessor

        self._processor_of_both = AutoProcessor.from_pretrained(checkpoint)

    def turn_to_fp32(self) -> None:
        """From now on :meth:`reference` has a model to run; the embedding table stays, its rows are cast."""
        self._dtype = torch.float32
        self._model.model.visual.float()
        language = self._model.model.language_model
        language.layers.float()
        language.norm.float()
        language.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())

    def reference(self, row: Row) -> np.ndarray | str:
        """The row's last item in FP32, after :meth:`turn_to_fp32`; or why not."""
        try:
            return self._calls(row)[0][-1]().float().cpu().numpy()
        except Exception as error:
            return one_line(error)
        finally:
            self._tidy()

    def _ways(self, row: Row) -> dict[str, Way]:
        if row.kind == "decode":
            subject = TransformersDecoder(self._checkpoint, "", self._dtype, str(self._device), self._model)
            subject.load(_decoder_case(row))
            return {BATCHED: Way(lambda: _between_tokens(subject.iterate(1)[0]), row.batch)}
        if row.kind == "requests":
            pipeline = TransformersPipeline(self._checkpoint, "", self._dtype, str(self._device), self._model)
            pipeline.make_ready(Case("pipeline", row.title, row.sizes, generate=row.generate))
            few = min(_ALONE, row.batch)
            return {
                ONE: Way(lambda: [pipeline.generate(1) for _ in range(few)], few),
                BATCHED: Way(partial(pipeline.generate, row.batch), row.batch),
            }
        one_at_a_time, batched = self._calls(row)
        items = len(one_at_a_time)
        ways = {ONE: Way(lambda: [call() for call in one_at_a_time][-1], items)}
        return ways | ({BATCHED: Way(batched, items)} if items > 1 else {})

    def _output(self, row: Row, result: Any) -> Tensor:
        return result

    def _calls(self, row: Row) -> _Calls:
        """One a item, and one of all."""
        calls = {"processor": self._processor, "vision": self._vision, "full model": self._full_model}
        return calls[row.kind](row)

    def _processor(self, row: Row) -> _Calls:
        images = self._pictures(row)

        def process(some: list[Tensor]) -> Tensor:
            processor = self._processor_of_both.image_processor
            found = processor(images=some, device=str(self._device), return_tensors="pt")
            return found["pixel_values"].to(self._dtype)

        return [partial(process, [image]) for image in images], partial(process, images)

    def _vision(self, row: Row) -> _Calls:
        patches, counts = self._patches(row), [t * h * w for t, h, w in row.grids]

        @torch.no_grad()
        def embed(pixels: Tensor, grids: list[Any]) -> Tensor:
            grid_thw = torch.tensor(grids, device=self._device)
            output = self._model.model.visual(pixels, grid_thw=grid_thw)
            return output if isinstance(output, Tensor) else output.pooler_output  # by release

        alone = [partial(embed, part, [grid]) for part, grid in zip(patches.split(counts), row.grids)]
        return alone, partial(embed, patches, list(row.grids))

    def _full_model(self, row: Row) -> _Calls:
        parts = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        text = self._processor_of_both.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        pictures = self._pictures(row)

        @torch.no_grad()
        def states(images: list[Tensor]) -> Tensor:
            """``[S, C]`` of the last sample; all have the same number of tokens, so none is padded."""
            inputs = self._processor_of_both(
                text=[text] * len(images),
                images=[[image] for image in images],
                return_tensors="pt",
                device=str(self._device),
            ).to(self._device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
            return self._model.model(**inputs, use_cache=False).last_hidden_state[-1]

        return [partial(states, [picture]) for picture in pictures], partial(states, pictures)


def _decoder_case(row: Row) -> Case:
    return Case("decoder", row.title, batch=row.batch, prompt=row.prompt, generate=row.generate)


def _between_tokens(sample: dict[str, list[float]]) -> float:
    times = sample["time_between_tokens"]
    return sum(times) / len(times)


def one_line(error: BaseException) -> str:
    """What went wrong, short enough for a table's footnote."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
