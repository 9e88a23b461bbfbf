"""Tables for stdout of which nothing is cut: a terminal that is too narrow for one gets a block a row instead."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000  # columns of a pipe or a file


def stdout_console() -> Console:
    """A console that wraps no line, which a terminal does by itself."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _UNLIMITED)


def print_table(table: Table, console: Console) -> None:
    """Print a table whose cells are texts, or, where it does not fit, its cells one below the other."""
    if console.measure(table, options=console.options.update(max_width=_UNLIMITED)).maximum <= console.width:
        console.print(table)
        return
    first, *others = table.columns
    for heading in (table.title, first.header):
        if heading:
            console.print(Text(str(heading), style="bold"))
    labels = [str(column.header) for column in others]
    width = max(map(len, labels), default=0)
    name = ""
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns))):
        name = str(cells[0]) or name  # that of the row above is not repeated in a table
        console.print(Text(name, style="bold"))
        for label, cell in zip(labels, cells[1:]):
            if str(cell):
                console.print(Text(f"  {label:<{width}}  {cell}" if label else f"  {cell}", style=str(row.style or "")))
