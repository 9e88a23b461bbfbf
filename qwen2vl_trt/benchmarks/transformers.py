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

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.export.importable_torchvision import allow_torchvision
from qwen2vl_trt.windows import Grid

from .cases import PROMPT, Case
from .roofline import best_seconds, synchronize
from .workload import Sample, System, Workload

BATCHED, ONE = "batched", "one at a time"


class TransformersSystem(System):
    """Transformers on a checkpoint.

    Args:
        checkpoint: its folder.
        precision: for the name.
        dtype: of weights and activations.
        device: as torch names it.
        whole: keep the whole model; otherwise what the first case needs, which saves memory.
    """

    def __init__(self, checkpoint: Path, precision: str, dtype: torch.dtype, device: str, whole: bool = False) -> None:
        super().__init__(torch.device(device))
        self.name = f"Transformers {precision}"
        self.dtype, self._checkpoint, self._whole = dtype, checkpoint, whole
        allow_torchvision()
        if whole:
            _ = self.model

    def make(self, stage: str) -> TransformersWorkload:
        return _WORKLOADS[stage](self)

    @cached_property
    def model(self) -> Any:
        """Raises BenchmarkError where Transformers cannot read the checkpoint."""
        from transformers import Qwen2_5_VLForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(self._checkpoint, dtype=self.dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise BenchmarkError(f"Transformers cannot load {self._checkpoint}: {error}") from None
        return model.eval().to(self.device)

    @cached_property
    def tower(self) -> Any:
        """The vision tower; unless the model is kept whole, the rest of it goes."""
        tower = self.model.model.visual
        if not self._whole:
            del self.model
        return tower

    @cached_property
    def decoder(self) -> Any:
        """The model; unless it is kept whole, without its vision tower."""
        if not self._whole:
            del self.model.model.visual
        return self.model

    @cached_property
    def processor(self) -> Any:
        """Image processor and tokenizer."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self._checkpoint, padding_side="left")

    def chat_text(self, images: int) -> str:
        """The prompt of a request with so many images."""
        parts = [{"type": "image"}] * images + [{"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": parts}]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def reference(self, case: Case) -> np.ndarray:
        """The case's last item alone, in FP32 from now on; the embedding table stays, its rows are cast."""
        if self.dtype != torch.float32:
            self.workload, self.dtype = None, torch.float32
            self.model.model.visual.float()
            language = self.model.model.language_model
            language.layers.float()
            language.norm.float()
            language.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float())
        self.workload = self.make(case.stage)
        self.workload.how = ONE
        self.workload.load(case)
        return self.output()


class TransformersWorkload(Workload):
    """Runs one stage."""

    def __init__(self, system: TransformersSystem) -> None:
        self.system, self.device = system, system.device

    def _faster(self, ways: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
        """The way that ``how`` names, or the only one; else the faster of several, each run twice."""
        if self.how not in ways:
            seconds = {how: best_seconds(call, self.device, 1) for how, call in ways.items() if len(ways) > 1}
            self.how = min(ways, key=lambda how: seconds.get(how, 0.0))
        return ways[self.how]


class _Calls(TransformersWorkload):
    """A call of one item alone, or of all of a case together."""

    def load(self, case: Case) -> None:
        self._items, together = self.calls(case)

        def one_at_a_time() -> None:
            for call in self._items:
                call()

        ways: dict[str, Callable[[], Any]] = {BATCHED: together, ONE: one_at_a_time}
        self._call = self._faster(ways if len(self._items) > 1 else {"one image": together})

    @abstractmethod
    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        """One a item, and one of all."""

    def output(self) -> Tensor:
        return self._items[-1]()

    def sample(self) -> Sample:
        began = time.perf_counter()
        self._call()
        synchronize(self.device)
        return {"latency": [time.perf_counter() - began]}


class _Processor(_Calls):
    """Its image processor on the same tensors, and its patches in the type of the model."""

    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        processor, images = self.system.processor.image_processor, case.make_images(self.device)

        def process(some: list[Tensor]) -> Tensor:
            found = processor(images=some, device=str(self.device), return_tensors="pt")
            return found["pixel_values"].to(self.system.dtype)

        return [partial(process, [image]) for image in images], partial(process, images)


class _Vision(_Calls):
    """The vision tower alone, on patches as its own processor orders them; random pixels are the same work."""

    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        tower = self.system.tower
        config = tower.config
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        patches = case.make_patches(width, self.system.dtype).to(self.device if case.on_device else "cpu")

        @torch.no_grad()
        def embed(pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
            output = tower(pixels.to(self.device), grid_thw=torch.tensor(grids, device=self.device))
            embeds = output if isinstance(output, Tensor) else output.pooler_output  # by release
            return embeds if case.on_device else embeds.to("cpu")

        parts = patches.split([t * h * w for t, h, w in case.grids])
        alone = [partial(embed, part, [grid]) for part, grid in zip(parts, case.grids, strict=True)]
        return alone, partial(embed, patches, case.grids)


class _HiddenStates(_Calls):
    """Images and a question to the decoder's hidden states, image processor and tokenizer included."""

    def calls(self, case: Case) -> tuple[Sequence[Callable[[], Tensor]], Callable[[], Tensor]]:
        system, text = self.system, self.system.chat_text(1)
        pictures = case.make_images(self.device)

        @torch.no_grad()
        def states(images: list[Tensor]) -> Tensor:
            """``[S, C]`` of the last sample; all have the same number of tokens, so none is padded."""
            inputs = system.processor(
                text=[text] * len(images),
                images=[[image] for image in images],
                return_tensors="pt",
                device=str(self.device),
            ).to(self.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(system.dtype)
            return system.model.model(**inputs, use_cache=False).last_hidden_state[-1]

        return [partial(states, [picture]) for picture in pictures], partial(states, pictures)


class _Decoder(TransformersWorkload):
    """``generate``, greedy, all prompts as one batch."""

    def load(self, case: Case) -> None:
        self._model = self.system.decoder
        vocabulary = self._model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        special = {self._model.config.image_token_id, self._model.config.video_token_id}
        prompt = torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator)
        for token in special:  # without the tower no token may stand for an image
            prompt[prompt == token] = 0
        self.how = BATCHED if case.batch > 1 else "one prompt"
        self._case, self._prompt = case, prompt.to(self.device)

    @torch.no_grad()
    def sample(self) -> Sample:
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


class _Pipeline(TransformersWorkload):
    """Processor and ``generate`` from the same JPEG files to text: ``batch`` requests arrive, then the next ones."""

    def load(self, case: Case) -> None:
        self._images, self._case = case.make_files(), case
        ways = {ONE: self._one_at_a_time, BATCHED: self._batched}
        self._call = self._faster(ways if case.batch > 1 else {"one request": self._one_at_a_time})

    def iterate(self, count: int) -> list[Sample]:
        samples: list[Sample] = []
        for _ in range(count):
            began = time.perf_counter()
            samples += [{"latency": [end - began]} for end in self._call()]
        return samples

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
        processor = self.system.processor
        text = self.system.chat_text(len(self._images))
        images = [[Image.open(BytesIO(image)).convert("RGB") for image in self._images] for _ in range(batch)]
        inputs = processor(text=[text] * batch, images=images, padding=True, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.system.dtype)
        tokens = self.system.model.generate(
            **inputs,
            do_sample=False,
            repetition_penalty=1.0,
            min_new_tokens=self._case.generate,
            max_new_tokens=self._case.generate,
        )
        processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


_WORKLOADS: dict[str, type[TransformersWorkload]] = {
    "processor": _Processor,
    "vision": _Vision,
    "decoder": _Decoder,
    "hidden states": _HiddenStates,
    "pipeline": _Pipeline,
}
