"""Show what TensorRT is at, and stop it on Ctrl-C."""

from __future__ import annotations

import threading
from typing import Any

from .progress import BuildSteps


def progress_monitor(trt: Any, steps: BuildSteps, interrupted: threading.Event) -> Any:
    """A monitor for the builder's configuration, which does not keep it alive."""

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
