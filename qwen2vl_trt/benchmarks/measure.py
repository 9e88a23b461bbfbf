"""What the benchmarks share: options, contenders that run in turn, the machine, tables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qwen2vl_trt import __version__
from qwen2vl_trt.accuracy.machine import processor
from qwen2vl_trt.engines.command import folder_name, path_name
from qwen2vl_trt.errors import Qwen2VLError

from .workers import Worker, peak_bytes

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
    One that fails by then is named on stderr and left out.
    """
    with ExitStack() as stack:
        # One is set up before the next starts: they would slow each other.
        workers = []
        for contender in contenders:
            try:
                worker = stack.enter_context(Worker(contender.name, partial(_Timed, contender.setup)))
                worker.call("seconds")
            except Qwen2VLError as error:
                print(f"{contender.name} failed: {error}", file=sys.stderr)
                continue
            workers.append(worker)
        rounds = [[worker.call("seconds") for worker in workers] for _ in range(repetitions)]
        return [
            Result(worker.name, statistics.median(times), worker.call("peak_mb"))
            for worker, times in zip(workers, zip(*rounds, strict=True), strict=True)
        ]


class _Timed:
    def __init__(self, setup: Callable[[], Call]) -> None:
        self._call = setup()

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        own = self._call()
        return own if isinstance(own, float) else time.perf_counter() - start

    def peak_mb(self) -> float:
        """Of this process so far."""
        return peak_bytes() / 2**20


def gpu(device: torch.device) -> dict[str, Any]:
    """The GPU, for the head of a report; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, load and versions, for the head of a report; a package that is not installed is left out.

    The load is the system's average of the last minute, a measurement's own threads included: above these others took
    part.
    """
    versions = {"qwen2vl-trt": __version__, "torch": torch.__version__}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"load": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}),  # Windows has none
        "python": platform.python_version(),
        **versions,
    }


class Sheet:
    """What one command compares: prints the machine, then a table a case; keeps all for ``--json``.

    Args:
        options: of :func:`option_parser`.
        *packages: whose versions belong to the figures.
    """

    def __init__(self, options: argparse.Namespace, *packages: str) -> None:
        self._options = options
        self._facts = heading(*packages)
        self._tables: dict[str, list[Result]] = {}

    def compare(
        self, title: str, contenders: Sequence[Contender], unit: str, figure: Callable[[float], float]
    ) -> list[Result]:
        """Time contenders in turn and print a table; the fastest Transformers row is what ratios compare with.

        Args:
            title: of the table.
            contenders: its rows.
            unit: of the figure column.
            figure: from a call's seconds to it.
        """
        results = self._tables[title] = compete(contenders, self._options.repetitions)
        rivals = [result.seconds for result in results if "Transformers" in result.name]
        print(f"\n{title:<44}{unit:>12}{'vs best Transformers':>24}{'peak memory':>14}")
        for result in results:
            ratio = f"{min(rivals) / result.seconds:.2f}x" if rivals else ""
            print(f"  {result.name:<42}{figure(result.seconds):>12.2f}{ratio:>24}{result.peak_mb:>11,.0f} MB")
        return results

    def save(self) -> None:
        """Write all tables as JSON where asked for."""
        if self._options.json is not None:
            rows = {title: [asdict(result) for result in results] for title, results in self._tables.items()}
            self._options.json.write_text(json.dumps({"machine": self._facts, "seconds a call": rows}, indent=2))


def heading(*packages: str) -> dict[str, Any]:
    """Print the machine and the command; returns what :func:`machine` found."""
    facts = machine(*packages)
    print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    print("$ python -m benchmarks." + " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]))
    return facts


def option_parser(
    doc: str, repetitions: int | None = None, work_dir: bool = False, depth: tuple[int, int] | None = None
) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common.

    Args:
        doc: of the benchmark's module; its first line describes the command.
        repetitions: by default; without, there is no such option.
        work_dir: whether there is a folder that may be kept, see :func:`work_folder`.
        depth: layers of the decoder and blocks of the vision tower by default; without, there are no such options.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if work_dir:
        parser.add_argument("--work-dir", type=folder_name, help="keeps what is written; by default a temporary folder")
    if repetitions is not None:
        parser.add_argument("--repetitions", type=int, default=repetitions, help="default %(default)s")
    if depth is not None:
        layers, blocks = depth
        parser.add_argument("--layers", type=int, default=layers, help="of the decoder (default %(default)s)")
        parser.add_argument("--blocks", type=int, default=blocks, help="of the vision tower (default %(default)s)")
    parser.add_argument("--json", type=path_name, metavar="FILE", help="also write the figures here")
    return parser


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """``--work-dir``, or a folder that is removed at the end."""
    with TemporaryDirectory() as temporary:
        yield options.work_dir or Path(temporary)


def print_figures(rows: Mapping[str, str], options: argparse.Namespace, figures: Mapping[str, float]) -> None:
    """Print a column of figures by name, and write ``figures`` as JSON where asked for."""
    for name, value in rows.items():
        print(f"{name:<28}{value:>13}")
    if options.json:
        options.json.write_text(json.dumps(vars(options) | dict(figures), default=str, indent=2))
