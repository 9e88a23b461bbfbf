"""The report of ``bench comparisons``: as text, for JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..files import write_plot
from ..machine import gpu, machine, one_line
from .cases import BATCHED, ONE, Row
from .run import DTYPE, ModelResults, Report, Result, Timing

_MB = 1e6
_COLORS = {ONE: "#1b6ca8", BATCHED: "#7db3d8"}
_SEED = "#d1711b"


def text(report: Report) -> Iterator[str]:
    """Line by line."""
    yield one_line(_machine(report))
    if report.plan.reduced:
        yield report.plan.reduced
    yield f"measured in this run, bfloat16: {report.rates}"
    for model in report.models:
        yield ""
        yield f"{model.name}: {_depth(model)}, random weights, BF16, torch backend"
        yield from _table(_speed_rows(model))
        yield ""
        yield from _table(_memory_rows(model, torch.device(report.device).type == "cuda"))
        for result in model.results:
            for error in result.errors:
                yield f"  {result.row.case.label}: {error}"


def _depth(model: ModelResults) -> str:
    return f"{model.config.text.num_hidden_layers} layers, {model.config.vision.depth} vision blocks"


def _speed_rows(model: ModelResults) -> Iterator[Sequence[str]]:
    yield (
        *("", "unit", "ours", f"Transformers, {ONE}", f"Transformers, {BATCHED}", f"x {ONE}", f"x {BATCHED}"),
        *("floor", "reached", "the seed"),
    )
    for result in model.results:
        row, theirs = result.row, result.theirs
        ratios = result.ratios
        reached = "n/a" if result.floor is None or result.seconds is None else f"{result.floor / result.seconds:.0%}"
        yield (
            row.case.label,
            row.unit,
            _figure(row, result.seconds),
            *(_figure(row, theirs[how].seconds) if how in theirs else "" for how in (ONE, BATCHED)),
            *(f"{ratios[how]:.2f}x" if how in ratios else "" for how in (ONE, BATCHED)),
            _figure(row, result.floor),
            reached,
            _published(row),
        )


def _memory_rows(model: ModelResults, cuda: bool) -> Iterator[Sequence[str]]:
    """A CPU's process keeps what it once had, so what a row adds to it is known on a GPU alone."""
    yield (
        *(
            f"peak memory{' (above what was there before)' * cuda}, MB",
            "ours",
            f"Transformers, {ONE}",
            f"Transformers, {BATCHED}",
        ),
        *("deviation: ours", "Transformers"),
    )
    for result in model.results:
        deviation = result.deviation
        yield (
            result.row.case.label,
            _memory(result.ours.get(BATCHED), cuda),
            *(_memory(result.theirs.get(how), cuda) for how in (ONE, BATCHED)),
            *(("", "") if deviation is None else (f"{deviation.ours:.2e}", f"{deviation.theirs:.2e}")),
        )


def _figure(row: Row, seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    value = 1 / seconds if row.is_rate else 1e3 * seconds
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _published(row: Row) -> str:
    if row.published is None:
        return "-"
    return f"{row.published.before} to {row.published.after} ms, {row.published.ratio}x"


def _memory(timing: Timing | None, cuda: bool) -> str:
    if timing is None or timing.seconds is None:
        return ""
    return f"{timing.peak / _MB:,.0f}" + f" ({(timing.peak - timing.before) / _MB:,.0f})" * cuda


def _table(rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """As Markdown, aligned."""
    lines = list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "| " + " | ".join("-" * width for width in widths) + " |"


def _machine(report: Report) -> dict[str, Any]:
    return gpu(torch.device(report.device)) | machine("transformers", "torchvision")


def as_dict(report: Report, command: list[str]) -> dict[str, Any]:
    """For JSON; seconds and bytes, null where a figure is missing."""
    return {
        "command": command,
        "machine": _machine(report),
        "device": report.device,
        "reduced": report.plan.reduced or None,
        "interrupted": report.interrupted,
        "rates": {"dtype": str(DTYPE).removeprefix("torch."), **report.rates.as_dict()},
        "models": [
            {
                "name": model.name,
                "layers": model.config.text.num_hidden_layers,
                "blocks": model.config.vision.depth,
                "rows": [_row(result) for result in model.results],
            }
            for model in report.models
        ],
    }


def _row(result: Result) -> dict[str, Any]:
    row = result.row
    return {
        "title": row.case.label,
        "stage": row.case.stage,
        "unit": row.unit,
        "ours": _timings(result.ours),
        "transformers": _timings(result.theirs),
        "ratios": result.ratios,
        "floor_seconds_per_item": result.floor,
        "deviation_from_fp32": result.deviation and asdict(result.deviation),
        "seed": row.published and asdict(row.published),
        "errors": result.errors,
    }


def _timings(timings: dict[str, Timing]) -> dict[str, Any]:
    return {
        how: {
            "seconds_per_item": timing.seconds,
            "runs": timing.runs,
            "peak_bytes": timing.peak,
            "bytes_before": timing.before,
        }
        for how, timing in timings.items()
    }


def save_plot(report: Report, path: Path) -> None:
    """How many times faster than Transformers, a panel a model; the seed's published ratio as a line.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    rows = len(report.plan.rows)
    drawing = Figure(figsize=(10, len(report.models) * (0.55 * rows + 0.8) + 0.6), layout="constrained")
    for axis, model in zip(drawing.subplots(len(report.models), 1, squeeze=False)[:, 0], report.models):
        _draw(axis, model)
    where = _machine(report).get("gpu") or _machine(report)["cpu"]
    drawing.suptitle(f"times faster than Transformers, BF16, {where}{', reduced' * bool(report.plan.reduced)}")
    write_plot(path, drawing)


def _draw(axis: Any, model: ModelResults) -> None:
    seen: set[str] = set()

    def label(name: str) -> str:
        return "" if name in seen or seen.add(name) else name  # type: ignore[func-returns-value]

    for place, result in enumerate(model.results):
        for offset, how in ((-0.18, ONE), (0.18, BATCHED)):
            if how in result.ratios:
                ratio = result.ratios[how]
                name = label(f"Transformers {how}")
                axis.barh(place + offset, ratio, 0.34, color=_COLORS[how], label=name)
                axis.annotate(f" {ratio:.2f}x", (ratio, place + offset), va="center", fontsize=7)
        if (published := result.row.published) is not None:
            ends = [place - 0.4, place + 0.4]
            axis.plot([published.ratio] * 2, ends, color=_SEED, linewidth=2, label=label("the seed, published (A6000)"))
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(model.results)), [result.row.case.label for result in model.results], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="both", labelsize=7)
    axis.set_title(f"{model.name}: {_depth(model)}", loc="left", fontsize=9)
    axis.legend(fontsize=7, loc="lower right")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
