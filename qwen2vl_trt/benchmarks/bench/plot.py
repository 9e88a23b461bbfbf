"""Latency percentiles as a picture: one panel a stage's figure, a row a case, ours above the rival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_plot
from .percentiles import Statistics
from .run import Report, Result

_PANELS = {
    "processor": ("latency",),
    "vision": ("latency",),
    "decoder": ("time_to_first_token", "time_between_tokens"),
    "pipeline": ("latency",),
}
_TITLES = {
    ("processor", "latency"): "preprocessor: latency of a call",
    ("vision", "latency"): "vision: latency of a call",
    ("decoder", "time_to_first_token"): "decoder: time to first token",
    ("decoder", "time_between_tokens"): "decoder: time between tokens",
    ("pipeline", "latency"): "pipeline: latency of a request",
}
_MARKS = (("median", "o"), ("p90", "|"), ("p95", "|"), ("p99", "D"))
_OURS, _RIVAL, _FLOOR = "#1b6ca8", "#d1711b", "#7a7a7a"
_ROW = 0.42  # inches
_GAP = 0.35  # rows between cases


def what_ran(report: Report) -> str:
    """A picture's title: model, backend, precision and device."""
    manifest = report.engines.manifest
    return f"{manifest.model}, {manifest.backend} {manifest.precision} on {report.engines.device}"


def save_plot(report: Report, path: Path) -> None:
    """Draw a report.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    panels = [
        (stage, figure, shown)
        for stage, figures in _PANELS.items()
        for figure in figures
        if (shown := [r for r in report.results if r.case.stage == stage and figure in r.ours.statistics])
    ]
    rows = [sum(1 + (figure in _rival_figures(result)) for result in shown) for _, figure, shown in panels]
    heights = [(count + _GAP * len(shown)) * _ROW + 0.6 for count, (_, _, shown) in zip(rows, panels)]
    drawing = Figure(figsize=(9.5, sum(heights) + 0.9), layout="constrained")
    axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (stage, figure, shown) in zip(axes, panels):
        _draw(axis, figure, shown)
        axis.set_title(_TITLES[stage, figure], loc="left", fontsize=10, fontweight="bold")
    drawing.suptitle(
        f"{what_ran(report)}\n● median   | p90, p95   ◆ p99   line: min to max   dashes: floor",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    write_plot(path, drawing)


def _rival_figures(result: Result) -> dict[str, Statistics]:
    return result.rival.statistics if result.rival is not None else {}


def _draw(axis: Any, figure: str, results: list[Result]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    labels, places, place = [], [], 0.0
    for result in results:
        for measurement, color in ((result.ours, _OURS), (result.rival, _RIVAL)):
            if measurement is None or figure not in measurement.statistics:
                continue
            ratio = result.ratios.get(figure) if measurement is result.ours else None
            _row(axis, place, measurement.statistics[figure], color, f" ({ratio:.2f}x)" if ratio else "")
            how = f", {measurement.how}" if measurement.how else ""
            labels.append(f"{result.case.label}\n{measurement.name}{how}")
            places.append(place)
            floor = result.floors.get(figure)
            if measurement is result.ours and floor is not None and result.streams == 1:
                axis.plot(
                    [1e3 * floor.seconds] * 2, [place - 0.35, place + 0.35], color=_FLOOR, linestyle="--", linewidth=1.2
                )
            place += 1
        place += _GAP
    axis.set_yticks(places, labels, fontsize=7.5)
    axis.set_ylim(places[-1] + 0.6, -0.6)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", which="both", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _row(axis: Any, place: float, values: Statistics, color: str, ratio: str) -> None:
    axis.plot([values.min, values.max], [place, place], color=color, linewidth=1.6, alpha=0.6, solid_capstyle="butt")
    points = {"median": values.median} | {f"p{number}": value for number, value in values.percentiles.items()}
    for name, marker in _MARKS:
        axis.plot(points[name], place, marker, color=color, markersize=9 if marker == "|" else 6)
    axis.annotate(
        f"{values.median:,.4g}{ratio}",
        (values.median, place),
        (0, 6),
        textcoords="offset points",
        fontsize=7.5,
        ha="center",
    )
