"""Our preprocessor on a GPU against Transformers' there: what ``benchmarks.processor`` adds where there is one.

Each gets 64 uint8 images, from the GPU's memory or the host's, and is timed until the GPU is done. The floor is the
bytes that must move (8 bits in, patches out; from the host, 8 bits over the bus) at the rates that plain copies reach.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Call, Contender, Result, compete, report
from export.importable_torchvision import allow_torchvision
from qwen2vl_trt.config import VisionConfig
from runtime.preprocessing.preprocessor import Kernels, Preprocessor
from runtime.preprocessing.triton_writer import triton_is_installed

IMAGES = 64
_SIDES = random.Random(0)
CASES = {
    f"{IMAGES} images of 448x448": [(448, 448)] * IMAGES,
    f"{IMAGES} images of mixed sizes, 200 to 1500 px": [
        (_SIDES.randint(200, 1500), _SIDES.randint(200, 1500)) for _ in range(IMAGES)
    ],
}

Process = Callable[[list[Tensor]], Tensor]


def ours(kernels: Kernels, dtype: torch.dtype, device: str) -> Process:
    """At default settings, writing over its last result as the pipeline has it do."""
    config = VisionConfig(32, 1280, 16, 3420, 3584, (7, 15, 23, 31))
    preprocessor = Preprocessor(config, device=device, dtype=dtype, kernels=kernels)
    memory: list[Tensor] = [torch.empty(0, dtype=dtype, device=device)]

    def process(images: list[Tensor]) -> Tensor:
        packed = preprocessor.preprocess(images, out=memory[0])
        memory[0] = max(memory[0], packed.pixel_values.view(-1), key=Tensor.numel)
        return packed.pixel_values

    return process


def transformers(device: str) -> Process:
    """At default settings, FP32."""
    allow_torchvision()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor: Any = Qwen2VLImageProcessor()
    return lambda images: processor(images=images, device=device, return_tensors="pt")["pixel_values"]


def pictures(sizes: Sequence[tuple[int, int]], device: str) -> list[Tensor]:
    """Noise; no contender's time depends on the values."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8).to(device) for size in sizes]


def timed(make: Callable[[], Process], sizes: Sequence[tuple[int, int]], source: str, device: str) -> Call:
    process, images = make(), pictures(sizes, source)

    def call() -> float:
        _wait(device)
        start = time.perf_counter()
        process(images)
        _wait(device)
        return time.perf_counter() - start

    return call


def floor(sizes: Sequence[tuple[int, int]], patch_bytes: int, source: str, device: str) -> float:
    """Seconds that the batch's bytes take at the rates of plain copies."""
    read = sum(3 * height * width for height, width in sizes)
    seconds = (read + patch_bytes) / _copy_rate(device)
    return seconds + (read / _bus_rate(device) if source == "cpu" else 0.0)


def compare(repetitions: int, device: str = "cuda") -> dict[str, list[Result]]:
    """Time and print every case; the tables, by title."""
    tables = {}
    rows: dict[str, Callable[[], Process]] = {"Transformers, torchvision, FP32": partial(transformers, device)}
    for kernels in ("triton", "torch") if triton_is_installed() else ("torch",):
        for name, dtype in (("FP32", torch.float32), ("BF16", torch.bfloat16)):
            rows[f"qwen2vl-trt, {kernels}, {name}"] = partial(ours, kernels, dtype, device)
    for case, sizes in CASES.items():
        patch_bytes = ours("torch", torch.bfloat16, device)(pictures(sizes, device)).nbytes
        for source, place in ((device, "on the GPU"), ("cpu", "on the host")):
            title = f"{case}, {place}"
            contenders = [Contender(name, partial(timed, make, sizes, source, device)) for name, make in rows.items()]
            tables[title] = compete(contenders, repetitions)
            report(title, tables[title], "us/image", lambda seconds: seconds * 1e6 / IMAGES)
            seconds = floor(sizes, patch_bytes, source, device)
            print(f"  {'floor of bytes moved, BF16':<42}{seconds * 1e6 / IMAGES:>12.2f}")
    return tables


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _copy_rate(device: str, size: int = 1 << 28) -> float:
    """Bytes read and written a second by a copy within the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    return 2 * size / _best(partial(torch.empty_like(source).copy_, source), device)


def _bus_rate(device: str, size: int = 1 << 28) -> float:
    """Bytes a second from pinned memory to the device."""
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu")
    return size / _best(partial(torch.empty_like(source, device=device).copy_, source, non_blocking=True), device)


def _best(copy: Callable[[], object], device: str, repetitions: int = 10) -> float:
    seconds = []
    for _ in range(repetitions):
        _wait(device)
        start = time.perf_counter()
        copy()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
