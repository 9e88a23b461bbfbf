"""A lock for objects that one thread at a time may use, in the process that made them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from qwen2vl_trt.errors import ExecutionError


class Exclusive:
    """A re-entrant lock that refuses forked processes.

    They have none of the parent's threads (PyTorch's neither) and cannot use its GPU, so they would wait for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        self.check_process()  # first: the lock may have been taken at the fork, by a thread that no longer exists
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def check_process(self) -> None:
        """Raises ExecutionError in a process forked from the one that made this object."""
        if os.getpid() != self._process:
            raise ExecutionError(
                f"this pipeline belongs to process {self._process}, from which this one was forked; make the pipeline"
                " after the fork, or start processes by spawn"
            )


class _HasExclusive(Protocol):
    _alone: Exclusive


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Owner = TypeVar("_Owner", bound=_HasExclusive)


def exclusive(
    method: Callable[Concatenate[_Owner, _Parameters], _Result],
) -> Callable[Concatenate[_Owner, _Parameters], _Result]:
    """Run a method inside its object's lock, the :class:`Exclusive` ``_alone``."""

    @wraps(method)
    def alone(self: _Owner, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with self._alone:
            return method(self, *args, **kwargs)

    return alone
