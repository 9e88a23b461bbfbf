"""A comparison as tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen2vl_trt.engines.tables import print_table

from .comparison import Row
from .figures import Figures
from .report import Report, is_block

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
    if report.yardstick is None:
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
