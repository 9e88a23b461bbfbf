"""Error by block, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2vl_trt.plots import color_of, new_figure, save

from .comparison import Row
from .report import Report, is_input
from .tolerance import DECODE_LOGITS, DECODER_PREFIX, HIDDEN_STATES, IMAGE_EMBEDS, LOGITS, VISION_PREFIX

_NAMES = {IMAGE_EMBEDS: "merger", HIDDEN_STATES: "norm", LOGITS: "logits", DECODE_LOGITS: "decode"}
_MOST_LABELS = 40


def plot(report: Report, path: Path) -> None:
    """Draw the mean relative error of every block, vision tower left, decoder right, on a log scale.

    Raises:
        FileError: the file cannot be written.
    """
    names = [name for name in report.rows[-1].outputs if not is_input(name)]
    places = range(len(names))
    figure, (axes,) = new_figure(max(8.0, min(20.0, 0.32 * len(names) + 3)), 4.8, [1.0])
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
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def _styled(report: Report) -> list[tuple[Row, dict[str, Any]]]:
    """The engine last, on top; a backend has its colour, and dashes where it computes in BF16 as the baseline does."""
    rows = [*report.others, report.engine]
    styled = [] if report.baseline is None else [(report.baseline, f"{report.baseline.name} (baseline)", "--")]
    styled += [(row, row.name, "-." if row.name.endswith("bf16") else "-") for row in rows]
    return [
        (
            row,
            {
                "color": color_of(row.name),
                "linestyle": line,
                "marker": "o" if row is report.engine else ".",
                "linewidth": 2 if row is report.engine else 1,
                "label": label,
            },
        )
        for row, label, line in styled
    ]


def _error(value: float) -> float:
    return value or float("nan")  # a log scale has no zero: the point is left out


def _label(name: str) -> str:
    for prefix, short in ((VISION_PREFIX + "blocks.", "block "), (DECODER_PREFIX + "layers.", "layer ")):
        name = name.replace(prefix, short)
    return _NAMES.get(name, name.removeprefix(VISION_PREFIX))
