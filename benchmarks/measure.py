"""What the benchmarks share: contenders in processes of their own, run in turn; the machine; tables."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
"""What is timed. If it returns a number, that is its seconds instead of its duration."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: its row.
        setup: returns the call to time; a module-level function or a ``functools.partial`` of one, since it runs in a
            process of the contender's own.
    """

    name: str
    setup: Callable[[], Call]


@dataclass(frozen=True)
class Result:
    """Median seconds of a call, and the peak resident memory in MB of the process that made it, all included."""

    name: str
    seconds: float
    peak_mb: float


def compete(contenders: Sequence[Contender], repetitions: int) -> list[Result]:
    """Time contenders in turn, repetition by repetition, so that a busy moment hits all of them.

    Each lives in its own process, so one's memory and thread pools are not another's. One warm-up call is not counted.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    for contender in contenders:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(contender.setup, there, torch.get_num_threads()), daemon=True)
        process.start()
        there.close()
        here.recv()  # set up before the next starts: they would slow each other
        workers.append((contender.name, here, process))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for repetition in range(repetitions + 1):
        for name, pipe, _ in workers:
            pipe.send("run")
            seconds = pipe.recv()
            if repetition:
                times[name].append(seconds)
    results = []
    for name, pipe, process in workers:
        pipe.send("stop")
        results.append(Result(name, statistics.median(times[name]), pipe.recv()))
        process.join()
    return results


def _work(setup: Callable[[], Call], pipe: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    call = setup()
    pipe.send("ready")
    while pipe.recv() == "run":
        start = time.perf_counter()
        own = call()
        pipe.send(own if isinstance(own, float) else time.perf_counter() - start)
    pipe.send(_peak_mb())


def _peak_mb() -> float:
    """Peak of this process. Not ``ru_maxrss`` where the system tells better: a child inherits its parent's."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores and versions, for the head of a report."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", *packages)},
    }


def report(title: str, results: Sequence[Result], unit: str, figure: Callable[[float], float]) -> None:
    """Print a table; the fastest Transformers row is what ratios compare with.

    Args:
        unit: of the figure column.
        figure: from a call's seconds to it.
    """
    rivals = [result.seconds for result in results if "Transformers" in result.name]
    print(f"\n{title:<44}{unit:>12}{'vs best Transformers':>24}{'peak memory':>14}")
    for result in results:
        ratio = f"{min(rivals) / result.seconds:.2f}x" if rivals else ""
        print(f"  {result.name:<42}{figure(result.seconds):>12.2f}{ratio:>24}{result.peak_mb:>11,.0f} MB")


def save(path: Path | None, facts: dict[str, Any], tables: Mapping[str, Sequence[Result]]) -> None:
    """Write the figures as JSON where asked for."""
    if path is not None:
        rows = {title: [asdict(result) for result in results] for title, results in tables.items()}
        path.write_text(json.dumps({"machine": facts, "seconds a call": rows}, indent=2))


def heading(facts: dict[str, Any]) -> None:
    """Print the machine and the command."""
    print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    print("$ python -m benchmarks." + " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]))
