"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_TIME = "no time left"


@dataclass(frozen=True)
class Finding:
    """One row's content.

    Attributes:
        result: ``measured`` is a figure that nothing is held against; ``skipped`` is no failure.
        words: why, or what was compared; empty where the result says it all.
        value: a figure, in ``unit``; None where there is none.
        share: of the limit, 1 being all of it; None where no limit is known.
        limit: what the share is of: ``memory`` or ``arithmetic``.
    """

    result: Literal["passed", "measured", "skipped", "failed"]
    words: str = ""
    value: float | None = None
    unit: str = ""
    share: float | None = None
    limit: str = ""


def within(error: float, most: float, words: str, unit: str) -> Finding:
    """Passed where an error is at most ``most``; one that is not finite is not."""
    over = "" if error <= most else f", more than {most:g}"
    return Finding("failed" if over else "passed", words + over, error, unit)


def equal(found: list[list[int]], expected: list[list[int]], words: str) -> Finding:
    """Passed where the tokens of all answers are the same."""
    same = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
    return Finding("passed" if same == len(expected) else "failed", words, same, f"of {len(expected)} answers equal")
