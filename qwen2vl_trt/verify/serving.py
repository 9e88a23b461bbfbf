"""Requests a second of the tiny model through :class:`~qwen2vl_trt.runtime.service.Service`."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.service import Service

from .requests import GREEDY, requests

_OPTIONS = PipelineOptions(generation_config="none", reuse_prefixes=False, embedding_cache_bytes=0)
"""Nothing is kept of a request for the next: those of a load differ."""


def requests_per_second(folder: Path, device: str, clients: list[int], seconds: float) -> dict[int, float]:
    """By number of clients, each of which asks again once it has its answer of 16 tokens about a picture.

    Args:
        seconds: of each number, after a round that does not count.
    """
    asked, found = requests(max(clients)), {}
    with Service(Pipeline.from_engine_dir(folder, device, _OPTIONS)) as service:

        def answer(number: int, end: float) -> int:
            """One client's answers from now to ``end``, at least one."""
            count = 0
            while not count or time.perf_counter() < end:
                _ = service.submit(asked[number], GREEDY).result().text  # raises what went wrong
                count += 1
            return count

        for count in clients:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(answer, range(count), [0.0] * count))
                began = time.perf_counter()
                answered = sum(pool.map(answer, range(count), [began + seconds] * count))
                found[count] = answered / (time.perf_counter() - began)
    return found
