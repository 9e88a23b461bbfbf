"""Our preprocessor against Transformers', from decoded uint8 images: 16 of 448x448 and 16 of mixed sizes.

    python -m benchmarks.processor [--repetitions 15] [--json FILE]

Where there is a GPU, :mod:`benchmarks.gpu_processor` follows.

Each contender gets the images in the form in which it is fastest (torch CHW, numpy HWC or PIL), found by trying them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import gpu_processor
from benchmarks.measure import Call, Contender, Result, compete, heading, machine, option_parser, report, save
from benchmarks.subjects.engines import picture
from export.importable_torchvision import allow_torchvision
from qwen2vl_trt.config import VisionConfig
from runtime.preprocessing.preprocessor import Preprocessor

_SIDES = random.Random(0)
CASES = {
    "16 images of 448x448": [(448, 448)] * 16,
    "16 images of mixed sizes, 200 to 1500 px": [
        (_SIDES.randint(200, 1500), _SIDES.randint(200, 1500)) for _ in range(16)
    ],
}
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda array: array,
    "torch": lambda array: torch.from_numpy(array).permute(2, 0, 1).contiguous(),
    "PIL": Image.fromarray,
}


def ours() -> Callable[[list[Any]], Any]:
    """At default settings, FP32, writing over its last result as the pipeline has it do."""
    preprocessor = Preprocessor(VisionConfig(32, 1280, 16, 3420, 3584, (7, 15, 23, 31)))
    memory: list[torch.Tensor] = [torch.empty(0)]

    def process(images: list[Any]) -> torch.Tensor:
        packed = preprocessor.preprocess(images, out=memory[0])
        memory[0] = max(memory[0], packed.pixel_values.view(-1), key=torch.Tensor.numel)
        return packed.pixel_values

    return process


def transformers(backend: str) -> Callable[[list[Any]], Any]:
    """At default settings, FP32; ``backend`` is torchvision (its default) or pillow."""
    allow_torchvision()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor: Any = Qwen2VLImageProcessorPil() if backend == "pillow" else Qwen2VLImageProcessor()
    return lambda images: processor(images=images, return_tensors="pt")


def in_its_fastest_form(make: Callable[[], Callable[[list[Any]], Any]], sizes: list[tuple[int, int]]) -> Call:
    process, arrays = make(), [np.array(picture(size, seed)) for seed, size in enumerate(sizes)]
    seconds = {}
    for form, convert in FORMS.items():
        images = [convert(array) for array in arrays[:4]]
        process(images)
        start = time.perf_counter()
        process(images)
        seconds[form] = time.perf_counter() - start
    best = min(seconds, key=lambda form: seconds[form])
    return partial(process, [FORMS[best](array) for array in arrays])


def main() -> None:
    options = option_parser(__doc__, repetitions=15).parse_args()
    facts = machine("torchvision", "transformers", "pillow", "numpy")
    heading(facts)
    tables: dict[str, Sequence[Result]] = {}
    for title, sizes in CASES.items():
        contenders = [
            Contender("qwen2vl-trt", partial(in_its_fastest_form, ours, sizes)),
            Contender(
                "Transformers, torchvision", partial(in_its_fastest_form, partial(transformers, "torchvision"), sizes)
            ),
            Contender("Transformers, Pillow", partial(in_its_fastest_form, partial(transformers, "pillow"), sizes)),
        ]
        tables[title] = compete(contenders, options.repetitions)
        report(title, tables[title], "ms/image", lambda seconds: seconds * 1e3 / 16)
    if torch.cuda.is_available():
        print(f"\n{torch.cuda.get_device_name()}")
        tables |= gpu_processor.compare(options.repetitions)
    save(options.json, facts, tables)


if __name__ == "__main__":
    main()
