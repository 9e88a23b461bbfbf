"""Show what TensorRT is at, and stop it on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .progress import BuildSteps


@contextmanager
def watched_build(trt: Any, config: Any, steps: BuildSteps) -> Iterator[None]:
    """Watch the build inside the ``with``.

    TensorRT runs no Python between its steps, and an exception must not pass through it: Ctrl-C is kept until the
    next step, which then asks TensorRT to end the build, and is raised when it has.

    Raises:
        KeyboardInterrupt: as usual, once TensorRT has stopped.
    """
    interrupted = threading.Event()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._depth: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._depth[phase_name] = self._depth.get(parent_phase, -1) + 1 if parent_phase else 0
            if self._depth[phase_name] < 2:  # deeper ones come and go too quickly to be read
                steps.start_phase(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            steps.end_phase(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps.advance_phase(phase_name)
            return not interrupted.is_set()

    monitor = Monitor()  # the configuration does not keep it alive
    config.progress_monitor = monitor
    handled = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set()) if handled else None
    try:
        yield
    finally:
        if handled:
            signal.signal(signal.SIGINT, before)
        config.progress_monitor = None
    if interrupted.is_set():
        raise KeyboardInterrupt
