"""The table as it grows, and the two files.

``verify.json``, format 1::

    {"format": 1, "command": [str], "interrupted": bool, "minutes": float, "seconds": float, "device": str,
     "machine": {fact: value},
     "checks": [{"check": str, "result": "passed" | "measured" | "skipped" | "failed", "words": str,
                 "value": float | null, "unit": str, "share": float | null, "limit": "memory" | "arithmetic" | "",
                 "seconds": float, "warnings": [str]}]}

``value`` is in ``unit``; ``share`` is of the ``limit`` that the rates measured in the same run set, 1 being all of it.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .finding import Finding

FORMAT = 1
_HEAD = ("check", "result", "figure", "share of the limit")
_WIDTHS = (38, 46, 24, 18)
_UNLISTED = ("gpus", "nvidia_smi", "instruction_sets", "memory_bytes")


@dataclass(frozen=True)
class Row:
    """A check by name, the seconds that it took, and what it logged as warnings."""

    name: str
    finding: Finding
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Of one run, ``interrupted`` until it has ended; rows are added as checks end."""

    command: list[str]
    minutes: float
    device: str
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = True

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.finding.result == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        checks = []
        for row in self.rows:
            entry = asdict(row.finding) | {"seconds": row.seconds, "warnings": row.warnings}
            finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in entry.items()}
            checks.append({"check": row.name, **finite})
        named = ("command", "interrupted", "minutes", "seconds", "device", "machine")
        return {"format": FORMAT, **{name: getattr(self, name) for name in named}, "checks": checks}

    def markdown(self) -> str:
        """A section to paste into docs/benchmarks.md."""
        ended = f"Interrupted after {self.seconds:.0f} s." if self.interrupted else f"{self.seconds:.0f} s."
        lines = [
            f"## `{' '.join(self.command[:2])}`: {self._name}",
            "",
            f"    {shlex.join(self.command)}",
            "",
            f"{ended} {summary(self)}.",
            "",
            *(f"- {line}" for line in facts(self.machine)),
            "",
            *head(),
            *map(table_row, self.rows),
            "",
        ]
        return "\n".join(lines)

    @property
    def _name(self) -> str:
        gpus = self.machine.get("gpus")
        return gpus[0]["name"] if gpus and self.device != "cpu" else str(self.machine.get("cpu", self.device))


def facts(machine: dict[str, Any]) -> Iterator[str]:
    """What the environment is, line by line."""
    if not machine:
        return
    sets = " ".join(machine["instruction_sets"])
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB; {sets}"
    for gpu in machine["gpus"]:
        yield (
            f"{gpu['name']}, {gpu['memory_bytes'] / 1e9:.0f} GB, compute capability {gpu['compute_capability']},"
            f" driver {machine['driver']}"
        )
    listed = {k: v for k, v in machine.items() if k not in (*_UNLISTED, "cpu", "cores", "gpu", "driver") and v}
    yield ", ".join(f"{name} {value}" for name, value in listed.items())
    if machine.get("load", 0) > machine["threads"]:
        yield f"load {machine['load']} on {machine['threads']} threads: other processes took part, figures are low"


def summary(report: Report) -> str:
    """How many checks ended how."""
    results = [row.finding.result for row in report.rows]
    return ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))


def head() -> Iterator[str]:
    """The head of the table, as Markdown."""
    yield _line(_HEAD)
    yield "|" + "|".join("-" * (width + 2) for width in _WIDTHS) + "|"


def table_row(row: Row) -> str:
    """A row as Markdown; its warnings stand with the result."""
    found = row.finding
    words = "; ".join(filter(None, (found.words, *(f"warned: {warning}" for warning in row.warnings))))
    figure = "" if found.value is None else f"{_number(found.value)} {found.unit}"
    share = "" if found.share is None else f"{found.share:.0%} of {found.limit}"
    return _line((row.name, found.result + (f": {words}" if words else ""), figure, share))


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").ljust(width) for cell, width in zip(cells, _WIDTHS)) + " |"
