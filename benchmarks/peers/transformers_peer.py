"""Transformers, as a system of :mod:`measured`."""

from __future__ import annotations

from typing import Any

import measured
import torch

_OPERATORS = measured.declare_operators()
from PIL import Image  # noqa: E402
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.utils import logging  # noqa: E402


class Transformers:
    """Prompts of one length need no padding; SDPA, its default."""

    def __init__(self, given: dict[str, Any]) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given["precision"]]
        self._model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(given["folder"], dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None
        self._processor = AutoProcessor.from_pretrained(given["folder"])

    @torch.inference_mode()
    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts}]
        prompt = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures = [Image.open(image) for image in images] * batch or None
        inputs = self._processor(text=[prompt] * batch, images=pictures, return_tensors="pt")
        found = self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        length = inputs["input_ids"].shape[1]
        if found.shape != (batch, length + tokens):
            raise SystemExit("an answer ended early")
        return length

    @torch.inference_mode()
    def embed(self, images: list[str]) -> None:
        found = self._processor.image_processor([Image.open(image) for image in images], return_tensors="pt")
        self._model.model.visual(found["pixel_values"].to(self._model.dtype), grid_thw=found["image_grid_thw"])


if __name__ == "__main__":
    measured.main(Transformers, "transformers", "torch")
