"""What is measured lives in a process of its own: one's memory, threads and device context are not another's."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qwen2vl_trt.errors import BenchmarkError, MissingDependencyError, Qwen2VLError

_PATIENCE = 5.0  # seconds for a process to end


class Worker:
    """Builds an object in a new process and calls its methods there. Use it in a ``with``.

    Args:
        name: of what it runs, for messages.
        setup: returns the object; a module-level function or a ``functools.partial`` of one.

    Raises:
        Qwen2VLError: as ``setup`` raised it. BenchmarkError where the process died, or for another exception.
    """

    def __init__(self, name: str, setup: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(setup, there, torch.get_num_threads()), daemon=True)
        try:
            self._process.start()
            there.close()
            self._answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # its process ends when it next looks for work
        if self._process.pid is not None:
            if kind is not None:
                self._process.terminate()
            self._process.join(_PATIENCE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        return self._process.is_alive()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object and return what it returns; raises as the constructor does."""
        with contextlib.suppress(BrokenPipeError):  # then it has died, which the answer tells
            self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join(_PATIENCE)
            code = self._process.exitcode
            died = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise BenchmarkError(f"the process of {self.name} {died}; with signal 9, memory ran out") from None
        if kind == "error":
            raise value
        if kind == "bug":
            raise BenchmarkError(f"in the process of {self.name}: {value.splitlines()[-1]}") from RuntimeError(value)
        return value


def _work(setup: Callable[[], Any], pipe: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    torch.set_num_threads(threads)
    target = None

    def perform(method: str, arguments: tuple[Any, ...]) -> Any:
        nonlocal target
        if target is None:
            target = setup()
            return None
        return getattr(target, method)(*arguments)

    request: tuple[str, tuple[Any, ...]] = ("", ())
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            try:
                answer = ("value", perform(*request))
            except Qwen2VLError as error:
                answer = ("error", error)
            except ModuleNotFoundError as error:  # it would lose the name on its way
                answer = ("error", MissingDependencyError(f"the package {error.name} is not installed"))
            except Exception:
                answer = ("bug", traceback.format_exc())
            pipe.send(answer)
            request = pipe.recv()


class _Once:
    def measure(self, call: Callable[..., object], *arguments: Any) -> dict[str, float]:
        before, began = peak_bytes(), time.perf_counter()
        call(*arguments)
        return {
            "time_s": time.perf_counter() - began,
            "peak_memory_mb": peak_bytes() / 1e6,
            "of_it_after_the_imports_mb": before / 1e6,
        }


def measured_call(name: str, call: Callable[..., object], *arguments: Any) -> dict[str, float]:
    """Seconds and peak memory of a call, libraries included, in a process of its own that ``name`` is of.

    Raises:
        Qwen2VLError: as a :class:`Worker` does.
    """
    with Worker(name, _Once) as worker:
        return worker.call("measure", call, *arguments)


def peak_bytes() -> int:
    """Peak resident memory of this process since it began, or since :func:`forget_peak`.

    Not ``ru_maxrss`` where the system tells better: a child inherits its parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Begin the peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
