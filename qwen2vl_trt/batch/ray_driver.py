"""A process of its own that is connected to Ray and calls functions there.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import psutil

from qwen2vl_trt.errors import BatchError, Qwen2VLError

_PATIENCE = 10.0  # seconds for processes that were killed to be gone
_DESCRIPTIONS = 200 << 20
"""Bytes of an object store where data goes from and to files."""

DriverT = TypeVar("DriverT", bound="RayDriver")


class RayDriver:
    """A driver that is connected to Ray, see :func:`connect`; at the end of its ``with`` nothing of it is left.

    Args:
        address: of a cluster; None starts a Ray of this machine that ends with it.
        num_cpus: of such a Ray.
        object_store_bytes: likewise.

    Attributes:
        resources: what Ray has: ``CPU``, ``GPU`` and so on.
        way_out: what to do once it is lost.
    """

    way_out = "start it again"

    def __init__(self, address: str | None, num_cpus: int, object_store_bytes: int = _DESCRIPTIONS) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_drive, args=(there, address, num_cpus, object_store_bytes), daemon=True)
        try:
            self._process.start()
            there.close()
            self.resources: dict[str, float] = self._receive()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self: DriverT) -> DriverT:
        return self

    def __exit__(self, *error: object) -> None:
        if error[:1] == (None,):
            with suppress(OSError, Qwen2VLError):  # whatever ended it: nothing more is asked of it
                self._pipe.send(None)
                self._receive()  # once Ray has been shut down
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
            _end_session(self._process.pid)
        self._pipe.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of a module returns there; raises its Qwen2VLError."""
        (found,) = self._values(False, function, args)
        return found

    def stream(self, function: Callable[..., Iterable[Any]], *args: Any) -> Iterator[Any]:
        """What one yields, each as it comes."""
        return self._values(True, function, args)

    def _values(self, *call: Any) -> Iterator[Any]:
        self._pipe.send(call)
        while (found := self._receive()) is not None:
            yield found[0]

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise BatchError(f"the process of Ray's driver ended with code {code}; {self.way_out}") from None
        if isinstance(answer, Qwen2VLError):
            raise answer
        return answer


def _drive(pipe: Connection, address: str | None, num_cpus: int, object_store_bytes: int) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    # Python's messages alone, which say what worker was lost: Ray's C++ warns of its own design, and prints stacks.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with connect(address, num_cpus, object_store_bytes) as resources:
            pipe.send(resources)
            while (call := pipe.recv()) is not None:
                many, function, args = call
                found = function(*args)
                for value in found if many else (found,):
                    pipe.send((value,))
                pipe.send(None)
        pipe.send(None)
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
def connect(address: str | None, num_cpus: int, object_store_bytes: int = _DESCRIPTIONS) -> Iterator[dict[str, float]]:
    """Ray for a ``with``: a cluster's (``auto``, ``ray://host:port``); for None one of this machine that ends with it.

    Yields what it has: ``CPU``, ``GPU`` and so on. Raises BatchError where there is no cluster.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later releases do, instead of a warning
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": object_store_bytes}
    try:
        ray.init(address or "local", **options)
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        where = f"no Ray cluster at {address}" if address else "Ray does not start on this machine"
        raise BatchError(f"{where}: {error}") from None
    try:
        with redirect_stdout(sys.stderr):  # where Ray says which worker was lost, and how
            yield ray.cluster_resources()
    finally:
        ray.shutdown()
