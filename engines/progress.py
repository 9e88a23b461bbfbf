"""Progress on a terminal, silence elsewhere; always on stderr, stdout is for answers."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_bar(*columns: TextColumn) -> Progress:
    """A rich progress bar for a ``with`` statement; ``columns`` follow its usual ones."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
