"""Partitions handed to workers by Ray Data, whose driver is a process and a session of its own.

Ray answers a signal in its own ways: an exit code for the driver's SIGTERM, a C++ stack where the raylet gets one
first, agents that live on for a minute. So no signal for the command's process group reaches it, and the command itself
ends all that the driver has started.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import psutil

from qwen2vl_trt.errors import BatchError, Qwen2VLError

from .partition_file import Done
from .rows import Partition
from .worker import Worker, WorkerSettings

_PATIENCE = 10.0  # seconds for processes that were killed to be gone
_OBJECT_STORE_BYTES = 200 << 20
"""Only descriptions of partitions pass through it: rows and results go from and to files."""


@dataclass
class Tally:
    """How many rows a run has come to: ``saved`` by it, ``skipped`` as saved by one before, ``failed`` in either."""

    saved: int = 0
    failed: int = 0
    skipped: int = 0
    first_failure: str = ""
    began: float = 0.0

    @property
    def rows(self) -> int:
        return self.saved + self.failed + self.skipped

    @property
    def rate(self) -> float:
        """Saved rows a second."""
        return self.saved / (time.perf_counter() - self.began)

    def skip(self, done: Done) -> None:
        """Count a partition that is there already."""
        self.skipped += done.saved
        self._fail(len(done.failures), done.failures[0]["error"] if done.failures else "")

    def add(self, result: dict[str, Any]) -> None:
        """Count what a worker said of a partition."""
        self.saved += result["saved"]
        self._fail(result["failed"], result["first_failure"])

    def _fail(self, count: int, first: str) -> None:
        self.failed += count
        self.first_failure = self.first_failure or first


class Driver:
    """A driver that is connected to Ray, see :func:`connect`; at the end of its ``with`` nothing of it is left.

    Attributes:
        resources: what Ray has: ``CPU``, ``GPU`` and so on.
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
        """See :func:`run_partitions`."""
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


@contextmanager
def connect(address: str | None, num_cpus: int) -> Iterator[dict[str, float]]:
    """Ray for a ``with``: a cluster's (``auto``, ``ray://host:port``); for None one of this machine that ends with it.

    Yields what it has: ``CPU``, ``GPU`` and so on. Raises BatchError where there is no cluster.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later releases do, instead of a warning
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address or "local", **options)
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        where = f"--address {address}: no Ray cluster there" if address else "Ray does not start on this machine"
        raise BatchError(f"{where}: {error}") from None
    try:
        with redirect_stdout(sys.stderr):  # where Ray says which worker was lost, and how
            yield ray.cluster_resources()
    finally:
        ray.shutdown()


def run_partitions(
    partitions: Sequence[Partition], settings: WorkerSettings, num_cpus: int, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """What :class:`qwen2vl_trt.batch.worker.Worker` returns for each partition, as they are done.

    Ray Data starts lost workers and their partitions again without end; :mod:`qwen2vl_trt.batch.journal` bounds that.

    Args:
        partitions: those that are not done.
        settings: of the workers.
        num_cpus: that a worker reserves.
        num_gpus: likewise; less than 1 to share one.

    Raises:
        BatchError: a worker found what ends the run, or Ray itself failed.
    """
    import ray
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1 << 20  # a block is one partition's description, and Ray reserves this much
    for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = (
        ray.data.from_items([asdict(partition) for partition in partitions], override_num_blocks=len(partitions))
        .map(
            cast(Any, Worker),  # Ray takes a class and makes one in each process
            fn_constructor_args=(settings,),
            # One partition at a time: none waits behind another while a worker is free.
            compute=ray.data.ActorPoolStrategy(size=settings.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        .iter_rows()
    )
    try:
        for row in rows:
            if row["fatal"]:
                raise BatchError(row["fatal"])
            yield row
    except RayError as error:
        cause = getattr(error, "cause", None) or error  # of a worker's; Ray's own text ends with advice on its settings
        said = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
        raise BatchError(f"Ray: {said}; run again with --resume to go on") from error
