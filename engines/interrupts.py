"""Ctrl-C and SIGTERM: they end a process at once, interrupt a command, or wait until they do no harm."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
TERMINATED = 143  # 128 + SIGTERM
_PATIENCE = 0.05  # seconds between two looks whether an import that was interrupted has ended


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


class CommandInterrupt:
    """Makes Ctrl-C and SIGTERM a KeyboardInterrupt, after an import that is under way, and notes which."""

    def __init__(self) -> None:
        self.seen: int | None = None
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        usual = (signal.default_int_handler, signal.SIG_DFL, end_at_once)
        # A shell's background job ignores Ctrl-C, which stays so.
        self._before = {number: handler for number, handler in before.items() if handler in usual}

    def __enter__(self) -> CommandInterrupt:
        for number in self._before:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit(self, message: str = "") -> NoReturn:
        """End the process with the signal's word, a message behind it, and the exit code."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)  # impatience is no news, until the process is gone
        self._before = {}
        terminated = self.seen == signal.SIGTERM
        word = "terminated" if terminated else "interrupted"
        print(f"{word}: {message}" if message else word, file=sys.stderr)
        sys.exit(TERMINATED if terminated else INTERRUPTED)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.seen = self.seen or number
        if _importing(frame):  # PyTorch aborts over an exception there, or drops it
            again = threading.Timer(_PATIENCE, signal.raise_signal, [number])
            again.daemon = True
            again.start()
            return
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
