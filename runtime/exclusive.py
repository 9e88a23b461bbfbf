"""One thread at a time, in one process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from qwen2vl_trt.errors import ExecutionError


class Exclusive:
    """What only one thread may be in: others wait. The thread that is in may come in again.

    A process forked from its maker's has none of its threads, PyTorch's neither, and cannot use its GPU: whatever waits
    for them waits for ever. So it is refused there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    def __enter__(self) -> None:
        self.check_process()  # first: the lock may have been held at the fork, by a thread that is not there
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def check_process(self) -> None:
        """See that this is the process that made it.

        Raises:
            ExecutionError: it is another, forked from that one.
        """
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
    """Let one thread at a time run a method of an object that has an :class:`Exclusive` as ``_alone``."""

    @wraps(method)
    def alone(self: _Owner, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with self._alone:
            return method(self, *args, **kwargs)

    return alone
