"""Tables at any width: no cell is cut, and none is broken while it fits a line."""

import sys
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from qwen2vl_trt.engines.tables import print_table, stdout_console

WIDTHS = (20, 40, 60, 80, 10_000)
CELLS = [
    ("image_embeds", "onnxruntime fp32", "1.23e-05", "0.99999999"),
    ("", "Transformers bf16", "4.56e-02", "0.99987654"),
    ("logits", "onnxruntime fp32", "0", ""),
]


def table():
    made = Table("output", "runner", title="an engine against Transformers fp32, 10 cases")
    for column in ("max absolute", "cosine"):
        made.add_column(column, justify="right")
    for cells in CELLS:
        made.add_row(*cells, style="red")
    return made


def printed(width):
    out = StringIO()
    print_table(table(), Console(file=out, soft_wrap=True, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_cell_is_whole(width):
    lines = printed(width).splitlines()
    for cell in filter(None, (cell for row in CELLS for cell in row)):
        assert any(cell in line for line in lines), (cell, lines)


def test_a_block_a_row_where_it_does_not_fit():
    assert printed(60).splitlines() == [
        "an engine against Transformers fp32, 10 cases",
        "output",
        "image_embeds",
        "  runner        onnxruntime fp32",
        "  max absolute  1.23e-05",
        "  cosine        0.99999999",
        "image_embeds",
        "  runner        Transformers bf16",
        "  max absolute  4.56e-02",
        "  cosine        0.99987654",
        "logits",
        "  runner        onnxruntime fp32",
        "  max absolute  0",
    ]
    assert len(printed(80).splitlines()) < len(printed(60).splitlines())


def test_a_terminal_has_a_width_and_a_pipe_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "43")
    monkeypatch.setenv("TERM", "xterm")
    out = StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert stdout_console().width > 1000
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    assert stdout_console().width == 43
