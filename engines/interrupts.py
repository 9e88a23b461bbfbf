"""Ctrl-C and SIGTERM kept until they do no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Keep the first Ctrl-C or SIGTERM until the end of the ``with``; a second one acts at once.

    For what ends by itself soon after it is told, and must not be broken off: a shard that is written, TensorRT, whose
    callbacks into Python swallow an exception.

    Yields:
        Set once either has come.

    Raises:
        KeyboardInterrupt: at the end, in place of any other exception.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no signals there, they go to the main thread
        yield came
        return
    kept: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell's background job ignores Ctrl-C; None is a handler of C, which Python cannot put back.
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        kept.append(number)
        came.set()
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        restore()
        if kept:
            signal.raise_signal(kept[0])
