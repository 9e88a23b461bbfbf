"""What the checks ask the tiny model."""

from __future__ import annotations

from qwen2vl_trt.benchmarks.cases import Case
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.runtime.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
_SIZES = ((84, 84), (60, 170), (200, 60), (150, 150), (33, 95), (56, 300))


def requests(count: int) -> list[Request]:
    """Of one picture each, all different, in several sizes, as JPEG files."""
    return [
        Request(
            "What digits are in the image?", Case("pipeline", "", (_SIZES[number % len(_SIZES)],)).make_files(number)
        )
        for number in range(count)
    ]
