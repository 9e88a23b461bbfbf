"""Our preprocessor against Transformers', on decoded uint8 images: time an image and growth of memory.

    python benchmarks/processor.py [--repetitions 9] [--json FILE]

Contenders run in turn, repetition by repetition, so that a busy moment hits all of them; medians are printed. Each
gets the images in the form in which it is fastest (torch CHW, numpy HWC or PIL), found by trying them first. Memory is
the peak of a fresh process during one call, beyond what it held before.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen2vl_trt.config import VisionConfig
from runtime.preprocessor import Preprocessor

CASES = {"16 of 448x448": [(448, 448)] * 16, "16 of mixed sizes": None}
CONTENDERS = ("qwen2vl-trt", "Transformers (torchvision)", "Transformers (Pillow)")
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda array: array,
    "torch": lambda array: torch.from_numpy(array).permute(2, 0, 1).contiguous(),
    "PIL": Image.fromarray,
}


def pictures(case: str, form: str) -> list[Any]:
    """Smooth noise, the same for every contender; mixed sides are drawn between 200 and 1500 px from one seed."""
    sides = random.Random(0)
    sizes = CASES[case] or [(sides.randint(200, 1500), sides.randint(200, 1500)) for _ in range(16)]
    generator = np.random.default_rng(0)
    images = []
    for height, width in sizes:
        coarse = generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        images.append(FORMS[form](np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))))
    return images


def processor(contender: str) -> Callable[[list[Any]], Any]:
    """A function from images to packed FP32 pixels, at default settings."""
    if contender == "qwen2vl-trt":
        config = VisionConfig(32, 1280, 16, 3420, 3584, (7, 15, 23, 31))
        return Preprocessor(config).preprocess
    allow_torchvision()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    reference: Any = Qwen2VLImageProcessorPil() if "Pillow" in contender else Qwen2VLImageProcessor()
    return lambda images: reference(images=images, return_tensors="pt")


@cache
def allow_torchvision() -> torch.library.Library | None:
    """Declare the operators on which a torchvision built for CUDA fails to import beside a PyTorch for the CPU."""
    with suppress(RuntimeError):
        import torchvision  # noqa: F401

        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fastest_form(run: Callable[[list[Any]], Any], case: str) -> str:
    times = {}
    for form in FORMS:
        images = pictures(case, form)
        run(images)
        times[form] = min(seconds(partial(run, images)) for _ in range(3))
    return min(times, key=lambda form: times[form])


def peak_growth(contender: str, case: str, form: str) -> float:
    """MB, of one call in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", contender, case, form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_of(contender: str, case: str, form: str) -> float:
    run, images = processor(contender), pictures(case, form)
    run(pictures("16 of 448x448", form)[:1])  # imports and thread pools are not the images' memory
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    result = run(images)
    after = status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    del result
    return after - before


def status(field: str) -> float:
    """MB of a field of /proc/self/status, 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


def machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    packages = ("torch", "torchvision", "transformers", "pillow", "numpy")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def measure(case: str, repetitions: int) -> list[dict[str, Any]]:
    runs = {contender: processor(contender) for contender in CONTENDERS}
    forms = {contender: fastest_form(run, case) for contender, run in runs.items()}
    images = {contender: pictures(case, form) for contender, form in forms.items()}
    times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(repetitions):
        for contender, run in runs.items():
            times[contender].append(seconds(partial(run, images[contender])))
    ours = statistics.median(times[CONTENDERS[0]])
    rows = []
    for contender in CONTENDERS:
        median = statistics.median(times[contender])
        rows.append(
            {
                "case": case,
                "processor": contender,
                "form": forms[contender],
                "ms_per_image": median * 1e3 / 16,
                "ratio_to_ours": median / ours,
                "peak_growth_mb": peak_growth(contender, case, forms[contender]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="runs of each contender (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory_of(*options.memory_of))
        return
    facts = machine()
    print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    for case in CASES:
        print(f"\n{case:<30}{'form':>8}{'ms/image':>11}{'ours is':>10}{'peak growth':>14}")
        for row in measure(case, options.repetitions):
            rows.append(row)
            ratio = f"{row['ratio_to_ours']:.1f}x" if row["processor"] != CONTENDERS[0] else ""
            print(
                f"  {row['processor']:<28}{row['form']:>8}{row['ms_per_image']:>11.2f}{ratio:>10}"
                f"{row['peak_growth_mb']:>11.0f} MB"
            )
    if options.json:
        options.json.write_text(
            json.dumps({"machine": facts, "repetitions": options.repetitions, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
