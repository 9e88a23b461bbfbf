"""Transformers doing the same work, in the best way that it has: batched, or one at a time where that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.export.importable_torchvision import allow_torchvision
from qwen2vl_trt.windows import Grid

from ..floors.rates import synchronize
from .engines import PROMPT, jpeg, pixels_of
from .shapes import Case
from .subject import Sample, Subject


def load_model(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' model.

    Raises:
        BenchmarkError: it cannot read the checkpoint.
    """
    allow_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise BenchmarkError(f"Transformers cannot load {checkpoint}: {error}") from None
    return model.eval().to(device)


class _TransformersSubject(Subject):
    """Transformers on a checkpoint; ``model`` where it is loaded already."""

    def __init__(self, checkpoint: Path, precision: str, dtype: torch.dtype, device: str, model: Any = None) -> None:
        super().__init__(torch.device(device))
        self.name = f"Transformers {precision}"
        self._checkpoint, self._dtype = checkpoint, dtype
        self._model = model

    def _faster(self, ways: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
        """The faster of several ways, each run twice; ``how`` says which."""
        seconds = {}
        for how, call in ways.items():
            call()
            synchronize(self.device)
            began = time.perf_counter()
            call()
            synchronize(self.device)
            seconds[how] = time.perf_counter() - began
        self.how = min(seconds, key=lambda how: seconds[how])
        return ways[self.how]


class TransformersProcessor(_TransformersSubject):
    """Its image processor on the same tensors, and its patches in the type of the model."""

    def load(self, case: Case) -> None:
        allow_torchvision()
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self._checkpoint).image_processor
        images = pixels_of(case)

        def process(some: list[torch.Tensor]) -> None:
            found = processor(images=some, device=str(self.device), return_tensors="pt")
            found["pixel_values"].to(self._dtype)

        def one_at_a_time() -> None:
            for image in images:
                process([image])

        batched = partial(process, images)
        ways: dict[str, Callable[[], None]] = {"batched": batched, "one at a time": one_at_a_time}
        self._call = self._faster(ways if len(images) > 1 else {"one image": batched})

    def iterate(self, count: int) -> list[Sample]:
        return [_whole(self._call, self.device) for _ in range(count)]


class TransformersVision(_TransformersSubject):
    """The vision tower alone, on patches as its own processor orders them; random pixels are the same work."""

    def load(self, case: Case) -> None:
        if self._model is None:
            model = load_model(self._checkpoint, self._dtype, self.device)
            self._model = model.model.visual
            del model
        config = self._model.config
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2

        def way(batches: list[tuple[Grid, ...]]) -> Callable[[], None]:
            counts = [sum(t * h * w for t, h, w in grids) for grids in batches]
            pixels = [torch.randn(count, width).to(self._dtype) for count in counts]
            return partial(self._embed, list(zip(pixels, map(torch.tensor, batches), strict=True)))

        batched = way([case.grids])
        one_at_a_time = {"one at a time": way([(grid,) for grid in case.grids])} if len(case.grids) > 1 else {}
        self._call = self._faster({"batched" if one_at_a_time else "one image": batched} | one_at_a_time)

    @torch.no_grad()
    def _embed(self, inputs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for pixels, image_grid_thw in inputs:
            output = self._model(pixels.to(self.device), grid_thw=image_grid_thw.to(self.device))
            (output if isinstance(output, torch.Tensor) else output.pooler_output).to("cpu")  # by release

    def iterate(self, count: int) -> list[Sample]:
        return [_whole(self._call, self.device) for _ in range(count)]


def _whole(call: Callable[[], object], device: torch.device) -> Sample:
    began = time.perf_counter()
    call()
    synchronize(device)
    return {"latency": [time.perf_counter() - began]}


class TransformersDecoder(_TransformersSubject):
    """``generate``, greedy, all prompts as one batch."""

    def load(self, case: Case) -> None:
        if self._model is None:
            self._model = load_model(self._checkpoint, self._dtype, self.device)
            del self._model.model.visual
        vocabulary = self._model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        special = {self._model.config.image_token_id, self._model.config.video_token_id}
        prompt = torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator)
        for token in special:  # without the tower no token may stand for an image
            prompt[prompt == token] = 0
        self.how = "batched" if case.batch > 1 else "one prompt"
        self._case, self._prompt = case, prompt.to(self.device)

    def iterate(self, count: int) -> list[Sample]:
        return [self._answer() for _ in range(count)]

    @torch.no_grad()
    def _answer(self) -> Sample:
        from transformers import StoppingCriteriaList

        times: list[float] = []

        def note(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            synchronize(self.device)
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        began = time.perf_counter()
        self._model.generate(
            input_ids=self._prompt,
            attention_mask=torch.ones_like(self._prompt),
            do_sample=False,
            repetition_penalty=1.0,
            min_new_tokens=self._case.generate,
            max_new_tokens=self._case.generate,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([note]),
        )
        return {
            "latency": [time.perf_counter() - began],
            "time_to_first_token": [times[0] - began] * self._case.batch,
            "time_between_tokens": [after - before for before, after in pairwise(times)],
        }


class TransformersPipeline(_TransformersSubject):
    """Processor and ``generate`` from the same JPEG files to text: ``batch`` requests arrive, then the next ones."""

    def load(self, case: Case) -> None:
        self.make_ready(case)
        ways = {"one at a time": self._one_at_a_time, "batched": self._batched}
        self._call = self._faster(ways if case.batch > 1 else {"one request": self._one_at_a_time})

    def make_ready(self, case: Case) -> None:
        """Load the model, unless it is there, and the images."""
        if self._model is None:
            self._model = load_model(self._checkpoint, self._dtype, self.device)
        # After the model, for which torchvision was made importable.
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(self._checkpoint, padding_side="left")
        self._images = [jpeg(size, seed) for seed, size in enumerate(case.sizes)]
        self._case = case

    def iterate(self, count: int) -> list[Sample]:
        return [sample for _ in range(count) for sample in self._round()]

    def _round(self) -> list[Sample]:
        began = time.perf_counter()
        return [{"latency": [end - began]} for end in self._call()]

    def _batched(self) -> list[float]:
        self.generate(self._case.batch)
        return [time.perf_counter()] * self._case.batch

    def _one_at_a_time(self) -> list[float]:
        ended = []
        for _ in range(self._case.batch):
            self.generate(1)
            ended.append(time.perf_counter())
        return ended

    @torch.no_grad()
    def generate(self, batch: int) -> None:
        """Answer so many requests as one batch."""
        parts = [{"type": "image"} for _ in self._images] + [{"type": "text", "text": PROMPT}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        images = [[Image.open(BytesIO(image)).convert("RGB") for image in self._images] for _ in range(batch)]
        inputs = self._processor(text=[text] * batch, images=images, padding=True, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        tokens = self._model.generate(
            **inputs,
            do_sample=False,
            repetition_penalty=1.0,
            min_new_tokens=self._case.generate,
            max_new_tokens=self._case.generate,
        )
        self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
