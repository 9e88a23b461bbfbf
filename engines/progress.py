"""Progress on a terminal, silence or lines elsewhere; always on stderr, stdout is for answers."""

from __future__ import annotations

import logging
import sys
import threading

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0


class _Lines(Progress):
    """Off a terminal: a line for each task every ten seconds."""

    def start(self) -> None:
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def stop(self) -> None:
        self._ended.set()
        self._writer.join()

    def _write(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            for task in self.tasks:
                total = "" if task.total is None else f" of {task.total:,g}"
                line = f"{task.description}: {task.completed:,g}{total}, {task.elapsed or 0:.0f} s"
                print(line, file=sys.stderr, flush=True)


def progress_bar(*columns: TextColumn, lines: bool = False) -> Progress:
    """A rich progress bar for a ``with`` statement.

    Args:
        columns: follow its usual ones.
        lines: off a terminal, write a line every ten seconds.
    """
    kind: type[Progress] = _Lines if lines and not sys.stderr.isatty() else Progress
    return kind(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


class BuildSteps:
    """Where a build is: called with the name of each step as it begins, and with phases inside a step."""

    def __init__(self, progress: Progress, model: str, total: int) -> None:
        self._progress, self._model = progress, model
        self._task = progress.add_task("building", total=total)
        self._phases: dict[str, TaskID] = {}

    def __call__(self, step: str) -> None:
        self._progress.update(self._task, description=step, advance=1)
        logger.info("%s: %s", self._model, step)

    def start_phase(self, name: str, total: int) -> None:
        """Show a bar of its own for part of a step."""
        self.end_phase(name)
        self._phases[name] = self._progress.add_task(f"  {name}", total=total)

    def advance_phase(self, name: str) -> None:
        """One of the phase's steps is done."""
        if name in self._phases:
            self._progress.advance(self._phases[name])

    def end_phase(self, name: str) -> None:
        """Take the bar away."""
        if name in self._phases:
            self._progress.remove_task(self._phases.pop(name))
