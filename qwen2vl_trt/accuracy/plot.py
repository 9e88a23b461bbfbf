"""Error by block, as a picture."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from qwen2vl_trt.errors import CompareError
from qwen2vl_trt.files import atomic_file

from .comparison import Row
from .report import Report, is_input
from .tolerance import DECODE_LOGITS, DECODER_PREFIX, HIDDEN_STATES, IMAGE_EMBEDS, LOGITS, VISION_PREFIX

_NAMES = {IMAGE_EMBEDS: "merger", HIDDEN_STATES: "norm", LOGITS: "logits", DECODE_LOGITS: "decode"}
_MOST_LABELS = 40


def plot(report: Report, path: Path) -> None:
    """Draw the mean relative error of every block, vision tower left, decoder right, on a log scale.

    Raises:
        CompareError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in report.rows[-1].outputs if not is_input(name)]
    places = range(len(names))
    figure = Figure(figsize=(max(8.0, min(20.0, 0.32 * len(names) + 3)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, style in _styled(report):
        outputs = row.outputs
        axes.plot(places, [_error(outputs[name].mean_relative if name in outputs else 0) for name in names], **style)
    vision = sum(name.startswith(VISION_PREFIX) or name == IMAGE_EMBEDS for name in names)
    axes.axvspan(-0.5, vision - 0.5, color="tab:blue", alpha=0.06, linewidth=0)
    above: dict[str, Any] = {"y": 1.02, "transform": axes.get_xaxis_transform(), "ha": "center", "color": "0.35"}
    if vision:
        axes.text(x=vision / 2 - 0.5, s="vision tower", **above)
    axes.text(x=(vision + len(names)) / 2 - 0.5, s="decoder", **above)
    first = report.first_block
    if first is not None:
        at = names.index(first[0])
        axes.axvline(at, color="tab:red", linewidth=1, linestyle=":")
        axes.annotate(
            f"first departs: {first[0]}",
            (at, 0.55),
            xycoords=axes.get_xaxis_transform(),
            xytext=(5, 0) if at < len(names) / 2 else (-5, 0),
            ha="left" if at < len(names) / 2 else "right",
            textcoords="offset points",
            color="tab:red",
        )
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(names) - 0.5)
    every = max(1, round(len(names) / _MOST_LABELS))
    shown = [at for at, name in enumerate(names) if at % every == 0 or name in _NAMES]
    axes.set_xticks(shown, [_label(names[at]) for at in shown], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_ylabel("mean relative error")
    axes.set_title(f"{report.manifest.model}: error against {report.reference}, {report.asked}", pad=22)
    axes.grid(axis="y", which="major", color="0.85")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    except OSError as error:
        raise CompareError(f"{path} cannot be written: {error.strerror or error}") from None


def _styled(report: Report) -> list[tuple[Row, dict[str, Any]]]:
    styles: list[tuple[Row, dict[str, Any]]] = []
    if report.yardstick is not None:
        label = f"{report.yardstick.name} (yardstick)"
        styles.append(
            (report.yardstick, {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 3, "label": label})
        )
    colours = cycle(("tab:green", "tab:purple", "tab:brown", "tab:pink"))
    for row, colour in zip(report.others, colours):
        styles.append((row, {"color": colour, "marker": ".", "linewidth": 1, "label": row.name}))
    styles.append(
        (
            report.engine,
            {"color": "tab:orange", "marker": "o", "markersize": 5, "linewidth": 2, "label": report.engine.name},
        )
    )
    return styles


def _error(value: float) -> float:
    return value or float("nan")  # a log scale has no zero: the point is left out


def _label(name: str) -> str:
    for prefix, short in ((VISION_PREFIX + "blocks.", "block "), (DECODER_PREFIX + "layers.", "layer ")):
        name = name.replace(prefix, short)
    return _NAMES.get(name, name.removeprefix(VISION_PREFIX))
