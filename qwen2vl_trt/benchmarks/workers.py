"""What is measured lives in a process of its own: its memory, threads and device context are not another's."""

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

_JOIN = 5.0  # seconds for a process to end


class Worker:
    """Builds an object in a new process and calls its methods there. Use it in a ``with``.

    The process starts at the first call, and again after one that ended it; a ``setup`` that failed is not repeated.

    Args:
        name: of what it runs, for messages.
        setup: returns the object; a module-level function or a ``functools.partial`` of one.

    Attributes:
        deadline: ``time.monotonic()`` at which the process of a call that has not ended is; None for never.
    """

    deadline: float | None = None

    def __init__(self, name: str, setup: Callable[[], Any]) -> None:
        self.name, self._setup = name, setup
        self._process: Any = None
        self._broken: Qwen2VLError | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._pipe.close()  # its process ends when it next looks for work
        if self._process.pid is not None:
            if kind is not None:
                self._process.terminate()
            self._process.join(_JOIN)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process = None

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object and return what it returns.

        Raises:
            Qwen2VLError: as the method or ``setup`` raised it. BenchmarkError where the process died, took too long, or
                for another exception.
        """
        if self._broken is not None:
            raise self._broken
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # then it has died, which the answer tells
            self._pipe.send((method, arguments))
        return self._answer()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(self._setup, there, torch.get_num_threads()), daemon=True)
        try:
            self._process.start()
            there.close()
            self._answer()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            self._broken = error if isinstance(error, Qwen2VLError) else None
            raise

    def _answer(self) -> Any:
        began = time.monotonic()
        if not self._pipe.poll(None if self.deadline is None else max(self.deadline - began, 0.0)):
            late = BenchmarkError(f"{self.name} was stopped after {time.monotonic() - began:.0f} s")
            self.__exit__(type(late), late, None)
            raise late
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join(_JOIN)
            code = self._process.exitcode
            self.__exit__(None, None, None)
            died = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise BenchmarkError(f"the process of {self.name} {died}; with signal 9, memory ran out") from None
        if kind == "error":
            raise value
        if kind == "bug":
            said, trace = value
            raise BenchmarkError(f"in the process of {self.name}: {said}") from RuntimeError(trace)
        return value


def _work(setup: Callable[[], Any], pipe: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    torch.set_num_threads(threads)
    target: Any = None
    answer: tuple[str, Any]  # a value, an error of this project, or what another one says and its traceback
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            try:
                if target is None:
                    target, answer = setup(), ("value", None)
                else:
                    method, arguments = pipe.recv()
                    answer = ("value", getattr(target, method)(*arguments))
            except (EOFError, ConnectionResetError):
                return
            except Qwen2VLError as error:
                answer = ("error", error)
            except ModuleNotFoundError as error:  # it would lose the name on its way
                answer = ("error", MissingDependencyError(f"the package {error.name} is not installed"))
            except Exception as error:
                said = "".join(traceback.format_exception_only(error)).splitlines()[0]  # CUDA's errors have several
                answer = ("bug", (said, traceback.format_exc()))
            pipe.send(answer)
            if target is None:
                return


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
    """Seconds and peak memory of a call in a new process, libraries included; raises as :meth:`Worker.call`."""
    with Worker(name, _Once) as worker:
        return worker.call("measure", call, *arguments)


def peak_bytes() -> int:
    """Peak resident memory of this process since it began, or since :func:`reset_peak`.

    Not ``ru_maxrss`` where the system tells better: a child inherits its parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Begin the peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
