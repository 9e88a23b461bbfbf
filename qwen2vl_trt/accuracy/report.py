"""A comparison's verdict and everything that it rests on, for JSON and as tables on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.tables import print_table

from .comparison import Row
from .figures import Figures
from .inputs import Case
from .tolerance import DECODER_PREFIX, PIXELS, TOKENS, VISION_PREFIX, Tolerance

FORMAT = 1
"""Of the JSON file."""


@dataclass(frozen=True)
class Report:
    """What was compared with what, and how far apart they are.

    Attributes:
        cases: what was asked, and the number of prompt tokens of each.
        inputs: our preprocessor and prompt builder against Transformers' processor.
        engine: the engine against the reference.
        baseline: Transformers in BF16 against it; None, and no verdict, where ``ended_by`` was before it.
        others: further runners, for information.
        notes: what could not be compared.
        ended_by: the Ctrl-C or the error.
    """

    folder: Path
    manifest: Manifest
    reference: str
    tolerance: Tolerance
    cases: tuple[tuple[Case, int], ...]
    inputs: Row
    engine: Row
    baseline: Row | None
    others: tuple[Row, ...]
    notes: tuple[str, ...]
    machine: Mapping[str, Any]
    command: str
    ended_by: BaseException | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """Everything that ran the model."""
        return (self.engine, *self.others, *([] if self.baseline is None else [self.baseline]))

    @property
    def asked(self) -> str:
        """The number of cases, for a title."""
        return f"{len(self.cases)} case{'s' * (len(self.cases) != 1)}"

    @cached_property
    def departures(self) -> dict[str, str]:
        """What of the engine's outputs is over the tolerance, and how; blocks are not judged, they explain."""
        if self.baseline is None:
            return {}
        outputs = self.inputs.outputs | {n: f for n, f in self.engine.outputs.items() if not is_block(n)}
        found = {name: self.departure(name, figures) for name, figures in outputs.items()}
        found["greedy tokens"] = self.tolerance.token_departure(self.engine.agreement)
        return {name: reason for name, reason in found.items() if reason is not None}

    @cached_property
    def first_block(self) -> tuple[str, str] | None:
        """The first block that is over the tolerance, and how; None where none is, or none was recorded."""
        for name, figures in self.engine.outputs.items():
            reason = self.departure(name, figures) if is_block(name) else None
            if reason is not None:
                return name, reason
        return None

    @property
    def layers(self) -> bool:
        """Whether blocks were recorded."""
        return any(is_block(name) for name in self.engine.outputs)

    def departure(self, name: str, figures: Figures) -> str | None:
        """What of one of the engine's outputs is over the tolerance; nothing is judged without a baseline."""
        if self.baseline is None:
            return None
        return self.tolerance.departure(name, figures, self.baseline.outputs.get(name))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; the verdict where there is a baseline."""
        found: dict[str, Any] = {
            "format": FORMAT,
            "command": self.command,
            "interrupted": self.ended_by is not None,
            "machine": dict(self.machine),
            "engine": {
                "folder": str(self.folder),
                **{name: getattr(self.manifest, name) for name in ("model", "model_hash", "backend", "precision")},
                "profile": self.manifest.profile.as_dict(),
                "versions": self.manifest.versions,
            },
            "reference": self.reference,
            "tolerance": asdict(self.tolerance),
            "cases": [
                {
                    "name": case.name,
                    "prompt_tokens": tokens,
                    "images": [f"{image.shape[2]}x{image.shape[1]}" for image in case.images],
                    "videos": [len(video.frames) for video in case.videos],
                }
                for case, tokens in self.cases
            ],
            "inputs": _row(self.inputs),
            "rows": {
                "engine": _row(self.engine),
                "baseline": None if self.baseline is None else _row(self.baseline),
                "others": [_row(row) for row in self.others],
            },
            "notes": list(self.notes),
        }
        if self.baseline is None:
            return found
        first = self.first_block
        return found | {
            "departures": self.departures,
            "first_departing_block": first and first[0],
            "passed": not self.departures,
        }

    def as_json(self) -> str:
        """:meth:`as_dict`, without infinities, which JSON has not."""
        return json.dumps(_finite(self.as_dict()), indent=2, allow_nan=False)


def is_block(name: str) -> bool:
    """Whether an output is one of the blocks that ``--layers`` records."""
    return name.startswith((VISION_PREFIX, DECODER_PREFIX))


def is_input(name: str) -> bool:
    """Whether an output is made before the model."""
    return name in (PIXELS, TOKENS)


def _row(row: Row) -> dict[str, Any]:
    agreement = row.agreement
    return {
        "name": row.name,
        "seconds": row.seconds,
        "outputs": {name: asdict(figures) for name, figures in row.outputs.items()},
        "greedy_tokens": asdict(agreement) if agreement.tokens else None,
        "cases": [{name: asdict(measured) for name, measured in case.items()} for case in row.cases],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FIGURES = ("max absolute", "mean absolute", "max relative", "mean relative", "cosine")


def print_report(report: Report, console: Console) -> None:
    """Print the outputs, the blocks where they were recorded, and the verdict."""
    print_table(_outputs(report), console)
    if report.layers:
        print_table(_blocks(report), console)
    for row in report.rows:
        console.print(f"{row.name}: {_tokens(row)}", highlight=False)
    for note in report.notes:
        console.print(f"not compared: {note}", highlight=False)
    if report.baseline is None:
        console.print(f"ended before {report.engine.name} could be judged", highlight=False)
        return
    if report.layers:
        first = report.first_block
        console.print(
            f"first block that departs: {first[0]}: {first[1]}" if first else "no block departs", highlight=False
        )
    for name, reason in report.departures.items():
        console.print(f"DEPARTS: {name} of {report.engine.name}: {reason}", style="red", highlight=False)
    if not report.departures:
        console.print(f"{report.engine.name} is within the tolerance of {report.manifest.precision}", highlight=False)


def _outputs(report: Report) -> Table:
    title = f"{report.engine.name} against {report.reference}, {report.asked}"
    table = Table("output", "runner", title=title)
    for column in _FIGURES:
        table.add_column(column, justify="right")
    for name, figures in report.inputs.outputs.items():
        table.add_row(name, report.inputs.name, *_cells(figures), end_section=True, style=_style(report, name, figures))
    for name in report.engine.outputs:
        if is_block(name):
            continue
        rows = [(row, row.outputs[name]) for row in report.rows if name in row.outputs]
        for number, (row, figures) in enumerate(rows):
            style = _style(report, name, figures) if row is report.engine else "dim"
            table.add_row("" if number else name, row.name, *_cells(figures), style=style)
        table.add_section()
    return table


def _blocks(report: Report) -> Table:
    table = Table("block", title="mean relative error by block")
    for row in report.rows:
        table.add_column(row.name, justify="right")
    table.add_column(f"max relative, {report.engine.name}", justify="right")
    for name in filter(is_block, report.engine.outputs):
        figures = report.engine.outputs[name]
        cells = [f"{row.outputs[name].mean_relative:.2e}" if name in row.outputs else "" for row in report.rows]
        table.add_row(name, *cells, f"{figures.max_relative:.2e}", style=_style(report, name, figures))
    return table


def _style(report: Report, name: str, figures: Figures) -> str:
    return "red" if report.departure(name, figures) else ""


def _cells(figures: Figures) -> list[Text]:
    errors = (figures.max_absolute, figures.mean_absolute, figures.max_relative, figures.mean_relative)
    return [Text("0" if error == 0 else f"{error:.2e}") for error in errors] + [Text(f"{figures.cosine:.8f}")]


def _tokens(row: Row) -> str:
    found = row.agreement
    where = "" if found.first is None else f", the first that differs is number {found.first + 1}"
    return f"{found.agreeing} of {found.tokens} greedy tokens agree{where}"
