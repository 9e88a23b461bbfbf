"""How many rows a batch job has come to, and how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .partition_file import Done


@dataclass
class Tally:
    """Rows of a run.

    Attributes:
        saved: by this run.
        failed: by this run or one before it.
        skipped: saved by one before it.
        first_failure: why.
        began: when the workers did.
    """

    saved: int = 0
    failed: int = 0
    skipped: int = 0
    first_failure: str = ""
    began: float = 0.0

    @property
    def rows(self) -> int:
        return self.saved + self.failed + self.skipped

    @property
    def rate(self) -> float:
        """Saved rows a second."""
        return self.saved / (time.perf_counter() - self.began)

    def skip(self, done: Done) -> None:
        """Count a partition that is there already."""
        self.skipped += done.saved
        self._fail(len(done.failures), done.failures[0]["error"] if done.failures else "")

    def add(self, result: dict[str, Any]) -> None:
        """Count what a worker said of a partition."""
        self.saved += result["saved"]
        self._fail(result["failed"], result["first_failure"])

    def _fail(self, count: int, first: str) -> None:
        self.failed += count
        self.first_failure = self.first_failure or first
