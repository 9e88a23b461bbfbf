"""Ray's driver, in a process and a session of its own.

Ray answers a signal in its own ways: an exit code for the driver's SIGTERM, a C++ stack where the raylet gets one
first, agents that live on for a minute. So no signal for the command's process group reaches it, and the command itself
ends all that the driver has started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from qwen2vl_trt.errors import BatchError, Qwen2VLError

from .cluster import connect, run_partitions
from .rows import Partition
from .worker import WorkerSettings

_PATIENCE = 10.0  # seconds for processes that were killed to be gone


class Driver:
    """A driver that is connected to Ray; use it in a ``with`` statement, at whose end nothing of it is left.

    Args:
        address: see :func:`qwen2vl_trt.fleet.cluster.connect`.
        num_cpus: likewise.

    Attributes:
        resources: what Ray has: ``CPU``, ``GPU`` and so on.

    Raises:
        BatchError: there is no cluster.
    """

    def __init__(self, address: str | None, num_cpus: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_drive, args=(there, address, num_cpus), daemon=True)
        try:
            self._process.start()
            there.close()
            self.resources: dict[str, float] = self._receive()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
            _end_session(self._process.pid)
        self._pipe.close()

    def run(
        self, partitions: Sequence[Partition], settings: WorkerSettings, num_cpus: int, num_gpus: float
    ) -> Iterator[dict[str, Any]]:
        """See :func:`qwen2vl_trt.fleet.cluster.run_partitions`."""
        self._pipe.send((partitions, settings, num_cpus, num_gpus))
        while (row := self._receive()) is not None:
            yield row

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise BatchError(
                f"the process of Ray's driver ended with code {code}; run again with --resume to go on"
            ) from None
        if isinstance(answer, Qwen2VLError):
            raise answer
        return answer


def _drive(pipe: Connection, address: str | None, num_cpus: int) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    # Python's messages alone, which say what worker was lost: Ray's C++ warns of its own design, and prints stacks.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with connect(address, num_cpus) as resources:
            pipe.send(resources)
            for row in run_partitions(*pipe.recv()):
                pipe.send(row)
        pipe.send(None)  # once Ray has been shut down
    except Qwen2VLError as error:
        pipe.send(error)


def _end_with_parent() -> None:
    """Whatever ended it: nobody is left to end this process and what it has started."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    _end_session(os.getpid())
    os._exit(1)


def _end_session(session: int) -> None:
    """Kill every process of a session but the caller; also those whose parents have ended, of which no tree knows."""
    if not hasattr(os, "getsid"):
        return
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.pid != os.getpid():
                process.send_signal(signal.SIGKILL)
                found.append(process)
    psutil.wait_procs(found, _PATIENCE)
