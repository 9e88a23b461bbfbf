"""Our preprocessor against Transformers', from decoded uint8 images: 16 of 448x448 and 16 of mixed sizes.

    python -m qwen2vl_trt.benchmarks.processor [--repetitions 15] [--json FILE]

Where there is a GPU, :mod:`qwen2vl_trt.benchmarks.gpu_processor` follows.

Each contender gets the images in the form in which it is fastest (torch CHW, numpy HWC or PIL), found by trying them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen2vl_trt.benchmarks import gpu_processor
from qwen2vl_trt.benchmarks.measure import Call, Contender, Sheet, option_parser
from qwen2vl_trt.benchmarks.subjects.engines import picture
from qwen2vl_trt.benchmarks.subjects.processors import Process, Size, batches, ours, transformers

IMAGES = 16
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda array: array,
    "torch": lambda array: torch.from_numpy(array).permute(2, 0, 1).contiguous(),
    "PIL": Image.fromarray,
}


def in_its_fastest_form(make: Callable[[], Process], sizes: Sequence[Size]) -> Call:
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
    sheet = Sheet(options, "torchvision", "transformers", "pillow", "numpy")
    rows: dict[str, Callable[[], Process]] = {
        "qwen2vl-trt": ours,
        "Transformers, torchvision": transformers,
        "Transformers, Pillow": partial(transformers, "pillow"),
    }
    for title, sizes in batches(IMAGES).items():
        contenders = [Contender(name, partial(in_its_fastest_form, make, sizes)) for name, make in rows.items()]
        sheet.compare(title, contenders, "ms/image", lambda seconds: seconds * 1e3 / IMAGES)
    if torch.cuda.is_available():
        print(f"\n{torch.cuda.get_device_name()}")
        gpu_processor.compare(sheet)
    sheet.save()


if __name__ == "__main__":
    main()
