"""Pictures of reports: one look, and one colour for a backend in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import FileError, require
from .files import check_target, write_result

COLORS = ("#1b6ca8", "#3a8f4d", "#8e5ea2", "#b23a48", "#b8902f", "#d1711b", "#3fa7a3", "#5b6270")
_BACKENDS = ("torch", "onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-llm", "Transformers")
GREY = "#7a7a7a"
SMALL, NORMAL, TITLE = 9, 10, 12
"""Sizes of text, in points."""


def color_of(name: str) -> str:
    """Of what a row's name begins with: a backend of the project, or Transformers."""
    backend = name.split()[0]
    return COLORS[_BACKENDS.index(backend)] if backend in _BACKENDS else GREY


def check_plot(path: Path, option: str, extra: str) -> None:
    """Refuse a picture that cannot be drawn or written, before the work that it shows.

    Args:
        path: of the picture.
        option: that asks for it.
        extra: of this package, that brings Matplotlib.

    Raises:
        FileError: as :func:`~qwen2vl_trt.files.check_target`, or Matplotlib knows no such suffix.
        MissingDependencyError: Matplotlib is not installed.
    """
    check_target(path)
    require(option, extra, {"matplotlib": "matplotlib"})
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise FileError(f"{path} is no name of a picture; let it end in .png, or one of {', '.join(sorted(kinds))}")


def new_figure(width: float, height: float, panels: list[float]) -> tuple[Any, list[Any]]:
    """A Matplotlib figure in inches, and its panels from above, of these relative heights."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=panels)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=SMALL)
        axis.set_axisbelow(True)
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Write a figure.

    Raises:
        FileError: it cannot be written.
    """
    write_result(path, lambda temporary: figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".")))
