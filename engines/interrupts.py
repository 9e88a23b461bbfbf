"""Ctrl-C and SIGTERM: ended at once while nothing has begun, kept until they do no harm."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TERMINATED = 143  # 128 + SIGTERM


def end_at_once(number: int, frame: object) -> NoReturn:
    """A handler for the time before a command begins: one word on stderr, and no traceback of what is imported."""
    os.write(2, b"terminated\n" if number == signal.SIGTERM else b"interrupted\n")
    os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)


def begin() -> None:
    """Let :func:`end_at_once` handle both, unless they are ignored, as Ctrl-C is in a shell's background job."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:
            signal.signal(number, end_at_once)


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
