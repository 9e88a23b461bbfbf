"""Reports as pictures: latency percentiles, speed-ups beside Transformers, and a timeline."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_trt.plots import COLORS, GREY, NORMAL, SMALL, TITLE, color_of, new_figure, save

from . import comparisons
from .bench import Report, Result
from .report import comparisons_machine, depth_of
from .timeline import GPU, HOST, REQUESTS, SLOTS, STEP, TITLES
from .transformers import BATCHED, ONE

_WIDTH = 10.0  # inches
_PANELS = {
    ("processor", "latency"): "preprocessor: latency of a call",
    ("vision", "latency"): "vision: latency of a call",
    ("decoder", "time_to_first_token"): "decoder: time to first token",
    ("decoder", "time_between_tokens"): "decoder: time between tokens",
    ("pipeline", "latency"): "pipeline: latency of a request",
}
_MARKS = {"median": "o", "p90": "|", "p95": "|", "p99": "D"}


def what_ran(report: Report) -> str:
    """A picture's title: model, backend, precision and device."""
    manifest = report.engines.manifest
    return f"{manifest.model}, {manifest.backend} {manifest.precision} on {report.engines.device}"


def _log_axis(axis: Any) -> None:
    """Only whole figures get a label: 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", which="both", linewidth=0.4, alpha=0.5)


def save_latencies(report: Report, path: Path) -> None:
    """Draw latency percentiles: a panel a stage's figure, a group of rows a case.

    Raises:
        FileError: it cannot be written.
    """
    panels = {
        (stage, figure): [r for r in report.results if r.case.stage == stage and figure in r.ours.statistics]
        for stage, figure in _PANELS
    }
    panels = {panel: shown for panel, shown in panels.items() if shown}
    rows = [sum(1.7 + (r.baseline is not None) for r in shown) + 1.8 for shown in panels.values()]
    drawing, axes = new_figure(_WIDTH, 0.5 * sum(rows) + 0.7, rows)
    for axis, ((stage, figure), shown) in zip(axes, panels.items()):
        _draw_latencies(axis, figure, shown)
        axis.set_title(_PANELS[stage, figure], loc="left", fontsize=TITLE, fontweight="bold")
    marks = "● median   | p90, p95   ◆ p99   line: min to max   dashes: roofline"
    drawing.suptitle(f"{what_ran(report)}\n{marks}", fontsize=TITLE, x=0.01, ha="left")
    save(drawing, path)


def _draw_latencies(axis: Any, figure: str, results: list[Result]) -> None:
    labels, places, place = [], [], 0.0
    for result in results:
        bound = result.roofline.get(figure)
        where = {"xycoords": axis.get_yaxis_transform(), "fontsize": NORMAL, "va": "center", "annotation_clip": False}
        axis.annotate(result.case.label.replace(",", ", "), (0.005, place - 0.6), fontweight="bold", **where)
        for measurement in (result.ours, result.baseline):
            if measurement is None or figure not in measurement.statistics:
                continue
            ours, color = measurement is result.ours, color_of(measurement.name)
            values = measurement.statistics[figure]
            axis.plot([values["min"], values["max"]], [place] * 2, color=color, linewidth=2, alpha=0.6)
            for name, marker in _MARKS.items():
                axis.plot(values[name], place, marker, color=color, markersize=9 if marker == "|" else 6)
            ratio = f" ({result.ratios[figure]:.2f}x)" if ours and figure in result.ratios else ""
            at = {"xytext": (0, 7), "textcoords": "offset points", "fontsize": SMALL, "ha": "center"}
            axis.annotate(f"{values['median']:,.3g}{ratio}", (values["median"], place), **at)
            if ours and bound is not None and result.streams == 1:
                axis.plot([1e3 * bound.seconds] * 2, [place - 0.35, place + 0.35], color=GREY, linestyle="--")
            labels.append(f"{measurement.name}{', ' * bool(measurement.how)}{measurement.how}")
            places.append(place)
            place += 1
        place += 0.7
    axis.set_yticks(places, labels, fontsize=NORMAL)
    axis.set_ylim(places[-1] + 0.5, -1)
    axis.set_xlabel("ms", fontsize=SMALL)
    _log_axis(axis)


def save_speedups(report: comparisons.Report, path: Path) -> None:
    """Draw how many times faster than Transformers, a panel a model.

    Raises:
        FileError: it cannot be written.
    """
    from matplotlib.patches import Patch

    rows = len(report.plan.rows)
    drawing, axes = new_figure(_WIDTH, len(report.models) * (0.6 * rows + 1) + 0.8, [1.0] * len(report.models))
    color = color_of("Transformers")
    styles: dict[str, dict[str, Any]] = {ONE: {"color": color}, BATCHED: {"color": color, "alpha": 0.5}}
    for axis, model in zip(axes, report.models):
        for place, result in enumerate(model.results):
            for offset, how in ((-0.18, ONE), (0.18, BATCHED)):
                if how in result.ratios:
                    ratio = result.ratios[how]
                    axis.barh(place + offset, ratio, 0.34, **styles[how])
                    axis.annotate(f" {ratio:.2f}x", (ratio, place + offset), va="center", fontsize=SMALL)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(rows), [result.row.case.label for result in model.results], fontsize=NORMAL)
        axis.set_ylim(rows - 0.4, -0.6)
        axis.set_title(f"{model.name}: {depth_of(model)}", loc="left", fontsize=NORMAL)
        _log_axis(axis)
    legend = [Patch(**style, label=f"against Transformers, {how}") for how, style in styles.items()]
    axes[-1].legend(handles=legend, fontsize=SMALL, loc="lower right")
    facts = comparisons_machine(report)
    where = f"{facts.get('gpu') or facts['cpu']}{', reduced' * bool(report.plan.reduced)}"
    drawing.suptitle(f"times faster than Transformers, {report.precision.name}, {where}", fontsize=TITLE)
    save(drawing, path)


_NO_REQUEST = "#c4c4c4"
_OF_STEP = ("wait for media", "preprocess", "vision", TITLES["prefill"], TITLES["decode"])
_INCH = 0.3  # a row's height
_SPACE = 0.16  # of a row, between two
_CAPTION = 0.8  # rows, above a group
_DIGIT = 6.5  # points that a digit of a label needs
_CAPTIONS = {
    "load": "threads that read and decode images, ahead of their turn",
    "step": "step(): one thread, one call after the other",
    "GPU": "GPU streams, between CUDA events",
    "requests": "requests: thin from arrival to first token, thick to the last",
}


@dataclass
class _Bar:
    """A part of a row: ``lane`` of ``lanes`` from above, for a request (None: for nobody)."""

    event: dict[str, Any]
    request: int | None
    lane: int = 0
    lanes: int = 1


@dataclass
class _Row:
    group: str
    label: str
    bars: list[_Bar]
    height: float = 1.0


def save_timeline(trace: dict[str, Any], title: str, path: Path) -> None:
    """Draw which stage works on which request when, and each request from its arrival to its end.

    Args:
        trace: of :meth:`qwen2vl_trt.benchmarks.timeline.Timeline.as_dict`.
        title: what ran where.
        path: of the picture.

    Raises:
        FileError: it cannot be written.
    """
    rows = _rows(trace)
    height = sum(row.height for row in rows) + _CAPTION * len({row.group for row in rows})
    drawing, (axis,) = new_figure(_WIDTH, height * _INCH + 0.8, [1.0])
    end = max(bar.event["ts"] + bar.event["dur"] for row in rows for bar in row.bars) / 1e3
    points = 72 * 0.82 * _WIDTH / end  # a millisecond's width, about
    top, middles, group = 0.0, [], ""
    for row in rows:
        if row.group != group:
            group, top = row.group, top + _CAPTION
            over_grid = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axis.text(0, top - _SPACE, _CAPTIONS[group], fontsize=SMALL, color="0.4", va="baseline", bbox=over_grid)
        for bar in row.bars:
            (_request if row.group == "requests" else _stage)(axis, bar, top, row.height - _SPACE, points)
        middles.append(top + (row.height - _SPACE) / 2)
        top += row.height
    axis.set_xlim(0, end * 1.005)
    axis.set_ylim(top + 0.1, 0)
    axis.set_yticks(middles, [row.label for row in rows], fontsize=SMALL)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("ms", fontsize=SMALL)
    axis.grid(axis="x", linewidth=0.4, alpha=0.5)
    axis.spines["left"].set_visible(False)
    drawing.suptitle(f"{title}\na colour and a number: a request", fontsize=TITLE, x=0.01, ha="left")
    save(drawing, path)


def _rows(trace: dict[str, Any]) -> list[_Row]:
    """Threads that load, the stages of the step, the GPU's streams, the requests."""
    events = trace["traceEvents"]
    tracks: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], names[event["pid"], event["tid"]]].append(event)
    rows = []
    for (group, name), slices in sorted(tracks.items(), key=lambda track: track[0]):
        if group == HOST and name != STEP:
            rows.append(_Row("load", f"load, {name.replace('load-media_', 'thread ')}", _shared(slices)))
    stages: dict[str, list[_Bar]] = {name: [] for name in ("load", *_OF_STEP)}
    for event in tracks[HOST, STEP]:
        if event["name"] not in (TITLES["prefill"], TITLES["decode"]):  # the slots' are drawn
            stages.get(event["name"], []).extend(_shared([event]))
    slots = [slices for (group, _), slices in tracks.items() if group == SLOTS]
    height = max(1.0, 0.35 * len(slots))  # of a row with a lane a slot
    for lane, slices in enumerate(slots):
        for event in slices:
            bar = _Bar(event, event["args"]["requests"][0])
            if event["name"] == TITLES["decode"]:
                bar.lane, bar.lanes = lane, len(slots)
            stages[event["name"]].append(bar)
    for name, bars in stages.items():
        if bars and name == TITLES["decode"]:
            rows.append(_Row("step", f"{name},\n{len(slots)} slots", bars, height))
        elif bars:
            rows.append(_Row("step", name, bars))
    for (group, name), slices in tracks.items():
        if group == GPU:
            drawn = [event for event in slices if event["name"] in _OF_STEP]
            rows.append(_Row("GPU", f"GPU, {name}", _shared(drawn), height))
    for (group, name), slices in tracks.items():
        if group == REQUESTS:
            rows.append(_Row("requests", name, [_Bar(event, int(name.split()[-1])) for event in slices[1:]]))
    return rows


def _shared(slices: list[dict[str, Any]]) -> list[_Bar]:
    """Each slice's height divided among the requests that it worked on."""
    bars = []
    for event in slices:
        requests = event["args"].get("requests") or [None]
        bars += [_Bar(event, request, lane, len(requests)) for lane, request in enumerate(requests)]
    return bars


def _stage(axis: Any, bar: _Bar, top: float, height: float, points: float) -> None:
    from matplotlib.patches import Rectangle

    start, length = bar.event["ts"] / 1e3, bar.event["dur"] / 1e3
    part = height / bar.lanes
    top += part * bar.lane
    edge = 0.5 if length * points > 3 else 0.0  # between steps that follow each other, where it leaves something
    axis.add_patch(
        Rectangle((start, top), length, part, facecolor=_color(bar.request), edgecolor="white", linewidth=edge)
    )
    if bar.request is not None and length * points > _DIGIT * len(str(bar.request)) and bar.lanes <= 2:
        middle, size = (start + length / 2, top + part / 2), SMALL if bar.lanes == 1 else 7
        axis.text(*middle, bar.request, color="white", fontsize=size, ha="center", va="center_baseline")


def _request(axis: Any, bar: _Bar, top: float, height: float, points: float) -> None:
    start, end = bar.event["ts"] / 1e3, (bar.event["ts"] + bar.event["dur"]) / 1e3
    width = 7.0 if bar.event["name"] == "answer" else 1.2
    axis.plot([start, end], [top + height / 2] * 2, color=_color(bar.request), linewidth=width, solid_capstyle="butt")


def _color(request: int | None) -> str:
    return _NO_REQUEST if request is None else COLORS[(request - 1) % len(COLORS)]
