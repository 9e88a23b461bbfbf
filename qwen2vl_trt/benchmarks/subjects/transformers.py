"""Transformers doing the same work, in the best way that it has: batched, or one at a time where that is faster."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.export.importable_torchvision import allow_torchvision
from qwen2vl_trt.windows import Grid

from ..floors.rates import synchronize
from .engines import PROMPT, jpeg, patches_of, pixels_of
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


def load_processor(checkpoint: Path) -> Any:
    """Transformers' image processor and tokenizer."""
    allow_torchvision()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(checkpoint, padding_side="left")


def chat_text(processor: Any, images: int) -> str:
    """The prompt of a request with so many images."""
    parts = [{"type": "image"}] * images + [{"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class TransformersSubject(Subject):
    """Transformers on a checkpoint; ``model`` where it is loaded already."""

    def __init__(self, checkpoint: Path, precision: str, dtype: torch.dtype, device: str, model: Any = None) -> None:
        super().__init__(torch.device(device))
        self.name = f"Transformers {precision}"
        self._checkpoint, self._dtype = checkpoint, dtype
        self._model = model

    def _faster(self, ways: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
        """The way that ``how`` names, or the only one; else the faster of several, each run twice."""
        if self.how not in ways:
            self.how = next(iter(ways)) if len(ways) == 1 else self._fastest(ways)
        return ways[self.how]

    def _fastest(self, ways: dict[str, Callable[[], Any]]) -> str:
        seconds = {}
        for how, call in ways.items():
            call()
            synchronize(self.device)
            began = time.perf_counter()
            call()
            synchronize(self.device)
            seconds[how] = time.perf_counter() - began
        return min(seconds, key=lambda how: seconds[how])


class _Call(TransformersSubject):
    """A call of one item alone, or of all of a case together."""

    def load(self, case: Case) -> None:
        self._items, together = self.calls(case)

        def one_at_a_time() -> None:
            for call in self._items:
                call()

        ways: dict[str, Callable[[], Any]] = {"batched": together, "one at a time": one_at_a_time}
        self._call = self._faster(ways if len(self._items) > 1 else {"one image": together})

    @abstractmethod
    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        """One a item, and one of all."""

    def output(self) -> Tensor:
        return self._items[-1]()

    def iterate(self, count: int) -> list[Sample]:
        return [self._sample() for _ in range(count)]

    def _sample(self) -> Sample:
        began = time.perf_counter()
        self._call()
        synchronize(self.device)
        return {"latency": [time.perf_counter() - began]}


class TransformersProcessor(_Call):
    """Its image processor on the same tensors, and its patches in the type of the model."""

    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        processor, images = load_processor(self._checkpoint).image_processor, pixels_of(case, self.device)

        def process(some: list[Tensor]) -> Tensor:
            found = processor(images=some, device=str(self.device), return_tensors="pt")
            return found["pixel_values"].to(self._dtype)

        return [partial(process, [image]) for image in images], partial(process, images)


class TransformersVision(_Call):
    """The vision tower alone, on patches as its own processor orders them; random pixels are the same work."""

    @cached_property
    def _tower(self) -> Any:
        model = self._model or load_model(self._checkpoint, self._dtype, self.device)
        return model.model.visual  # alone, in memory too

    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        tower = self._tower
        config = tower.config
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        patches = patches_of(case, width, self._dtype).to(self.device if case.on_device else "cpu")

        @torch.no_grad()
        def embed(pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
            output = tower(pixels.to(self.device), grid_thw=torch.tensor(grids, device=self.device))
            embeds = output if isinstance(output, Tensor) else output.pooler_output  # by release
            return embeds if case.on_device else embeds.to("cpu")

        parts = patches.split([t * h * w for t, h, w in case.grids])
        alone = [partial(embed, part, [grid]) for part, grid in zip(parts, case.grids, strict=True)]
        return alone, partial(embed, patches, case.grids)


class TransformersHiddenStates(_Call):
    """Images and a question to the decoder's hidden states, image processor and tokenizer included."""

    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        if self._model is None:
            self._model = load_model(self._checkpoint, self._dtype, self.device)
        processor, pictures = load_processor(self._checkpoint), pixels_of(case, self.device)
        text = chat_text(processor, 1)

        @torch.no_grad()
        def states(images: list[Tensor]) -> Tensor:
            """``[S, C]`` of the last sample; all have the same number of tokens, so none is padded."""
            inputs = processor(
                text=[text] * len(images),
                images=[[image] for image in images],
                return_tensors="pt",
                device=str(self.device),
            ).to(self.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
            return self._model.model(**inputs, use_cache=False).last_hidden_state[-1]

        return [partial(states, [picture]) for picture in pictures], partial(states, pictures)


class TransformersDecoder(TransformersSubject):
    """``generate``, greedy, all prompts as one batch."""

    def load(self, case: Case) -> None:
        if self._model is None:
            self._model = load_model(self._checkpoint, self._dtype, self.device)
            del self._model.model.visual  # the decoder alone, in memory too
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


class TransformersPipeline(TransformersSubject):
    """Processor and ``generate`` from the same JPEG files to text: ``batch`` requests arrive, then the next ones."""

    def load(self, case: Case) -> None:
        if self._model is None:
            self._model = load_model(self._checkpoint, self._dtype, self.device)
        self._processor = load_processor(self._checkpoint)
        self._images = [jpeg(size, seed) for seed, size in enumerate(case.sizes)]
        self._case = case
        ways = {"one at a time": self._one_at_a_time, "batched": self._batched}
        self._call = self._faster(ways if case.batch > 1 else {"one request": self._one_at_a_time})

    def iterate(self, count: int) -> list[Sample]:
        return [sample for _ in range(count) for sample in self._round()]

    def _round(self) -> list[Sample]:
        began = time.perf_counter()
        return [{"latency": [end - began]} for end in self._call()]

    def _batched(self) -> list[float]:
        self._generate(self._case.batch)
        return [time.perf_counter()] * self._case.batch

    def _one_at_a_time(self) -> list[float]:
        ended = []
        for _ in range(self._case.batch):
            self._generate(1)
            ended.append(time.perf_counter())
        return ended

    @torch.no_grad()
    def _generate(self, batch: int) -> None:
        """Answer so many requests as one batch."""
        text = chat_text(self._processor, len(self._images))
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
