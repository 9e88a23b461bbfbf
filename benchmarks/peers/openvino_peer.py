"""OpenVINO GenAI with continuous batching, as a system of :mod:`measured`.

Computes in FP32 or BF16 where that is asked, and in what OpenVINO takes by itself where the weights are INT8 or INT4.
"""

from __future__ import annotations

import sys
from typing import Any

import measured

HINTS = {"fp32": "f32", "bf16": "bf16"}


def convert(model: str, precision: str, folder: str) -> None:
    """By optimum-intel, whose ``fp32`` leaves the weights as they are, in BF16."""
    _operators = measured.declare_operators()
    from optimum.commands.optimum_cli import main

    sys.argv = ["optimum-cli", "export", "openvino", "--model", model, "--task", "image-text-to-text"]
    sys.argv += ["--weight-format", "fp32" if precision in HINTS else precision, folder]
    main()


class OpenVINO:
    """One thread, no prefix cache."""

    def __init__(self, given: dict[str, Any]) -> None:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.enable_prefix_caching = max(given["batches"]), False
        scheduler.max_num_batched_tokens = 2048
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1}
        if given["precision"] in HINTS:
            properties["INFERENCE_PRECISION_HINT"] = HINTS[given["precision"]]
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(given["folder"], scheduler, "CPU", properties)

    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        config = self._genai.GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        if images:
            pictures = [[_tensor(image) for image in images] for _ in range(batch)]
            found = self._pipeline.generate([text] * batch, images=pictures, generation_config=[config] * batch)
        else:
            found = self._pipeline.generate([text] * batch, [config] * batch)
        metrics = found[0].perf_metrics
        if metrics.get_num_generated_tokens() != batch * tokens:  # of them all
            raise SystemExit("an answer ended early")
        return metrics.get_num_input_tokens()

    def embed(self, images: list[str]) -> None:
        raise NotImplementedError


def _tensor(path: str) -> Any:
    import numpy
    import openvino
    from PIL import Image

    return openvino.Tensor(numpy.array(Image.open(path))[None])


if __name__ == "__main__":
    measured.main(OpenVINO, "openvino", "openvino-genai", convert=convert)
