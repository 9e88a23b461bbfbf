"""qwen2vl-trt, as a system of :mod:`measured`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import measured

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams


class Ours:
    """Nothing is remembered from one call to the next: peers would do all again."""

    def __init__(self, given: dict[str, Any]) -> None:
        options = PipelineOptions(reuse_prefixes=False, embedding_cache_bytes=0)
        self._pipeline = Pipeline.from_engine_dir(given["folder"], "cpu", options)

    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        outputs = self._pipeline.generate([Request(text, list(images)) for _ in range(batch)], params)
        if any(len(output.token_ids) != tokens for output in outputs):
            raise SystemExit("an answer ended early")
        return outputs[0].prompt_tokens

    def embed(self, images: list[str]) -> None:
        self._pipeline.embed_images(images)


if __name__ == "__main__":
    measured.main(Ours, "torch", "onnxruntime")
