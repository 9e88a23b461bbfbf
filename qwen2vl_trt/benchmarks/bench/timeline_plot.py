"""A timeline as a picture: a row a stage, a colour a request (``bench pipeline --trace-plot FILE``)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_plot
from ..subjects.timeline import GPU, HOST, REQUESTS, SLOTS, STEP, TITLES

COLORS = ("#1b6ca8", "#d1711b", "#3a8f4d", "#8e5ea2", "#b23a48", "#3fa7a3", "#b8902f", "#5b6270")
"""Of requests 1 to 8, 9 to 16 and so on."""
_NOBODY = "#c4c4c4"
_OF_STEP = ("wait for media", "preprocess", "vision", TITLES["prefill"], TITLES["decode"])
_INCH = 0.27  # a row's height
_SPACE = 0.16  # of a row, between two
_CAPTION = 0.75  # rows, above a group
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
    """Draw a trace: which stage works on which request when, and each request from its arrival to its end.

    Args:
        trace: of :meth:`qwen2vl_trt.benchmarks.subjects.timeline.Timeline.as_dict`.
        title: what ran where.
        path: of the picture.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    rows = _rows(trace)
    height = sum(row.height for row in rows) + _CAPTION * len({row.group for row in rows})
    drawing = Figure(figsize=(9.5, height * _INCH + 0.8), layout="constrained")
    axis = drawing.subplots()
    end = max(bar.event["ts"] + bar.event["dur"] for row in rows for bar in row.bars) / 1e3
    points = 72 * 7.8 / end  # a millisecond's width, about
    top, middles, group = 0.0, [], ""
    for row in rows:
        if row.group != group:
            group, top = row.group, top + _CAPTION
            over_grid = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axis.text(0, top - _SPACE, _CAPTIONS[group], fontsize=7.5, color="0.4", va="baseline", bbox=over_grid)
        for bar in row.bars:
            (_request if row.group == "requests" else _stage)(axis, bar, top, row.height - _SPACE, points)
        middles.append(top + (row.height - _SPACE) / 2)
        top += row.height
    axis.set_xlim(0, end * 1.005)
    axis.set_ylim(top + 0.1, 0)
    axis.set_yticks(middles, [row.label for row in rows], fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("ms", fontsize=8)
    axis.grid(axis="x", linewidth=0.4, alpha=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    drawing.suptitle(f"{title}\na colour and a number: a request", fontsize=10, x=0.01, ha="left")
    write_plot(path, drawing)


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
        middle, size = (start + length / 2, top + part / 2), 7.5 if bar.lanes == 1 else 6
        axis.text(*middle, bar.request, color="white", fontsize=size, ha="center", va="center_baseline")


def _request(axis: Any, bar: _Bar, top: float, height: float, points: float) -> None:
    start, end = bar.event["ts"] / 1e3, (bar.event["ts"] + bar.event["dur"]) / 1e3
    width = 7.0 if bar.event["name"] == "answer" else 1.2
    axis.plot([start, end], [top + height / 2] * 2, color=_color(bar.request), linewidth=width, solid_capstyle="butt")


def _color(request: int | None) -> str:
    return _NOBODY if request is None else COLORS[(request - 1) % len(COLORS)]
