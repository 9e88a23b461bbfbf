"""What TensorRT calls back while it parses and builds: a log, a progress monitor, a stream for the plan."""

from __future__ import annotations

import logging
import threading
from functools import cache
from typing import Any, BinaryIO

from .progress import BuildSteps

logger = logging.getLogger(__name__)

_LAYERS = "Layers:\n"


@cache
def tensorrt_log(trt: Any) -> Any:
    """The one log of a TensorRT module: it keeps the first logger it is given, whatever later builders bring."""

    class Log(trt.ILogger):
        """Collects instead of printing.

        Attributes:
            errors: since the last :meth:`clear`.
            layers: of the last engine, a line each, where built with detailed verbosity.
        """

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= self.Severity.ERROR and "Thread context has not been set" not in message:
                self.errors.append(message)
            elif severity == self.Severity.WARNING:
                logger.debug("TensorRT: %s", message)
            elif message.startswith(_LAYERS):  # the engine inspector's text, and needs no GPU
                self.layers = message.removeprefix(_LAYERS)

    return Log()


def progress_monitor(trt: Any, steps: BuildSteps, interrupted: threading.Event) -> Any:
    """Shows what the builder is at, and stops it once ``interrupted``. The builder holds no reference to it."""

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

    return Monitor()


def stream_writer(trt: Any, file: BinaryIO) -> Any:
    """An ``IStreamWriter`` into a file, so that a plan is never whole in memory.

    Its ``error`` is the one that ended it, which TensorRT would swallow.
    """

    class Writer(trt.IStreamWriter):
        error: OSError | None = None

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
