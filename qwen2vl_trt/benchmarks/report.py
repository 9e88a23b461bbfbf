"""Reports as text for people, and as JSON for programs: of ``bench`` and of ``bench comparisons``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qwen2vl_trt.machine import machine, one_line

from . import comparisons
from .bench import Report, Result
from .comparisons import OURS, ModelResults
from .measure import PERCENTILES, Measurement
from .transformers import BATCHED, ONE
from .workload import FIGURES

_GPU_FIGURES = ("enqueue", "h2d", "compute", "d2h")
_COLUMNS = ("min", "max", "mean", "median", *(f"p{number}" for number in PERCENTILES))
_GB, _MB = 1e9, 1e6
NO_FP8_RATE = "torch multiplies no FP8 numbers on this GPU, so their rate is not known"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """As Markdown, aligned; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "| " + " | ".join("-" * width for width in widths) + " |"


def text(report: Report) -> Iterator[str]:
    """Of an engine folder, line by line."""
    engines, rates = report.engines, report.rates
    yield f"{engines.folder}: {engines.manifest.model}, {engines.manifest.backend} {engines.manifest.precision}"
    yield one_line(_machine(report))
    fp8 = ""
    if engines.precision.fp8 and engines.device.type != "cpu":
        fp8 = f", of FP8 {'n/a' if rates.fp8_gemm is None else f'{rates.fp8_gemm / _GB:,.0f} GFLOP/s'}"
    yield f"measured in this run, {_dtype(report)}: {rates}{fp8}"
    for result in report.results:
        yield ""
        yield from _case(result)


def _case(result: Result) -> Iterator[str]:
    case = result.case
    patches = f" ({case.patches:,} patches{' a request' if case.stage == 'pipeline' else ''})" if case.grids else ""
    streams = f", {result.streams} streams" if result.streams > 1 else ""
    yield f"{case.stage} {case.label}{patches}{streams}"
    rows = [("ms", *_COLUMNS)]
    for measurement in filter(None, (result.ours, result.baseline)):
        for figure, values in measurement.statistics.items():
            rows.append((f"{measurement.name}, {FIGURES[figure]}", *(f"{values[name]:,.2f}" for name in _COLUMNS)))
    yield from table(rows)
    for measurement in filter(None, (result.ours, result.baseline)):
        yield from _measurement(measurement, result)
    if not any(figure in result.ours.statistics for figure in _GPU_FIGURES):
        yield f"  {', '.join(FIGURES[figure] for figure in _GPU_FIGURES)}: n/a (no CUDA events)"
    for figure, bound in result.roofline.items():
        if bound is None:
            yield f"  roofline of {FIGURES[figure]}: n/a ({NO_FP8_RATE})"
            continue
        yield (
            f"  roofline of {FIGURES[figure]}: {bound.seconds * 1e3:,.2f} ms, by {bound.limit}"
            f" ({bound.flops / _GB:,.2f} GFLOP, {bound.bytes / _MB:,.1f} MB);"
            f" {result.reached(figure, bound):.0%} reached"
        )
    if result.baseline is not None:
        ratios = (f"{FIGURES.get(name, name)} {ratio:.2f}x" for name, ratio in result.ratios.items())
        yield f"  against {result.baseline.name}: " + ", ".join(ratios)


def _measurement(measurement: Measurement, result: Result) -> Iterator[str]:
    throughput = ", ".join(f"{value:,.2f} {unit}" for unit, value in measurement.throughput(result.case).items())
    how = f" ({measurement.how})" if measurement.how else ""
    yield f"  {measurement.name}{how}: {throughput}; {len(measurement.samples)} in {measurement.seconds:.1f} s"
    if measurement.stages:
        yield "    " + ", ".join(f"{stage} {share:.1%}" for stage, share in measurement.shares.items())
    if (memory := measurement.memory) is not None:
        device = "n/a" if memory.device is None else f"{memory.device / _MB:,.0f} MB"
        yield f"    peak memory: host {memory.host / _MB:,.0f} MB, device {device}"


def as_dict(report: Report, command: list[str]) -> dict[str, Any]:
    """For JSON; what was not measured is null."""
    engines, manifest = report.engines, report.engines.manifest
    return {
        "command": command,
        "interrupted": report.ended_by is not None,
        "machine": _machine(report),
        "engines": {
            "folder": str(engines.folder),
            **{name: getattr(manifest, name) for name in ("model", "backend", "precision")},
            "device": str(engines.device),
            "profile": manifest.profile.as_dict(),
        },
        "rates": {"dtype": _dtype(report), **report.rates.as_dict()},
        "results": [
            {
                "stage": result.case.stage,
                "shape": result.case.label,
                "patches": result.case.patches or None,
                "batch": result.case.batch,
                "streams": result.streams,
                "ours": _figures(result.ours, result),
                "baseline": result.baseline and _figures(result.baseline, result),
                "ratios": result.ratios,
                "roofline": {
                    figure: bound
                    and {
                        **asdict(bound),
                        "ms": bound.seconds * 1e3,
                        "reached": result.reached(figure, bound),
                    }
                    for figure, bound in result.roofline.items()
                },
            }
            for result in report.results
        ],
    }


def _figures(measurement: Measurement, result: Result) -> dict[str, Any]:
    statistics = measurement.statistics
    return {
        "name": measurement.name,
        "how": measurement.how or None,
        "iterations": len(measurement.samples),
        "seconds": measurement.seconds,
        "throughput": measurement.throughput(result.case),
        "milliseconds": {figure: statistics.get(figure) for figure in FIGURES},
        "shares": measurement.shares or None,
        "memory_bytes": measurement.memory and asdict(measurement.memory),
    }


def _machine(report: Report) -> dict[str, Any]:
    versions = {name: value for name, value in report.engines.manifest.versions.items() if name != "torch"}
    packages = ["transformers"] if any(result.baseline for result in report.results) else []
    return machine(report.engines.device, *packages) | versions


def _dtype(report: Report) -> str:
    return str(report.engines.dtype).removeprefix("torch.")


_TIMES = {
    "latency": "latencyMs",
    "enqueue": "enqMs",
    "h2d": "h2dMs",
    "compute": "computeMs",
    "d2h": "d2hMs",
    "time_to_first_token": "timeToFirstTokenMs",
    "time_between_tokens": "timeBetweenTokensMs",
    "prefill": "prefillMs",
}


def times(report: Report) -> list[dict[str, Any]]:
    """Every sample (``--export-times``), in milliseconds; names as trtexec's where it has them."""

    def milliseconds(values: list[float]) -> float | list[float]:
        found = [1e3 * value for value in values]
        return found[0] if len(found) == 1 else found

    return [
        {
            "stage": result.case.stage,
            "shape": result.case.label,
            "name": measurement.name,
            "iterations": [
                {_TIMES[name]: milliseconds(values) for name, values in sample.items() if values}
                for sample in measurement.samples
            ],
        }
        for result in report.results
        for measurement in filter(None, (result.ours, result.baseline))
    ]


def operators(report: Report) -> list[dict[str, Any]]:
    """Time by operator (``--export-profile``)."""
    return [
        {
            "stage": result.case.stage,
            "shape": result.case.label,
            "operators": [asdict(operator) for operator in result.operators or ()],
        }
        for result in report.results
    ]


def comparisons_text(report: comparisons.Report) -> Iterator[str]:
    """Of ``bench comparisons``, line by line."""
    yield one_line(comparisons_machine(report))
    if report.plan.reduced:
        yield report.plan.reduced
    yield f"measured in this run, {report.precision.name}: {report.rates}"
    for model in report.models:
        yield ""
        yield f"{model.name}: {depth_of(model)}, random weights, torch backend in {report.precision.name}"
        yield from table(_speed_rows(model))
        yield ""
        yield from table(_memory_rows(model, report.device.type == "cuda"))
        for result in model.results:
            for error in result.errors:
                yield f"  {result.row.case.label}: {error}"


def comparisons_machine(report: comparisons.Report) -> dict[str, Any]:
    return machine(report.device, "transformers", "torchvision")


def depth_of(model: ModelResults) -> str:
    return f"{model.config.text.num_hidden_layers} layers, {model.config.vision.depth} vision blocks"


def _speed_rows(model: ModelResults) -> list[Sequence[str]]:
    ways = [f"Transformers, {how}" for how in (ONE, BATCHED)]
    head = ("", "unit", "ours", *ways, f"x {ONE}", f"x {BATCHED}", "roofline", "reached", "Qwen2.5-VL-Batched, A6000")
    rows: list[Sequence[str]] = [head]
    for result in model.results:
        row, ratios, seconds = result.row, result.ratios, result.seconds

        def figure(value: float | None, rate: bool = row.is_rate) -> str:
            if value is None:
                return "n/a"
            shown = 1 / value if rate else 1e3 * value
            return f"{shown:,.2f}" if shown >= 0.1 else f"{shown:.2g}"

        ours = seconds.get(OURS)
        reached = "n/a" if result.roofline is None or ours is None else f"{result.roofline / ours:.0%}"
        published = "-"
        if row.published is not None:
            before, after, ratio = row.published
            published = f"{before} to {after} ms, {ratio}x"
        rows.append(
            (
                *(row.case.label, row.unit, figure(ours)),
                *(figure(seconds.get(how)) if how in row.ways else "" for how in (ONE, BATCHED)),
                *(f"{ratios[how]:.2f}x" if how in ratios else "" for how in (ONE, BATCHED)),
                *(figure(result.roofline), reached, published),
            )
        )
    return rows


def _memory_rows(model: ModelResults, cuda: bool) -> list[Sequence[str]]:
    """A CPU's process does not shrink, so what a row adds to it is known on a GPU alone."""

    def megabytes(measurement: Measurement | None) -> str:
        if measurement is None or measurement.memory is None:
            return ""
        memory = measurement.memory
        if memory.device is None:
            return f"{memory.host / _MB:,.0f}"
        return f"{memory.device / _MB:,.0f} ({(memory.device - memory.before) / _MB:,.0f})"

    ways = [f"Transformers, {how}" for how in (ONE, BATCHED)]
    title = f"peak memory{' (above what was there before)' * cuda}, MB"
    rows: list[Sequence[str]] = [(title, "ours", *ways, "deviation: ours", "Transformers")]
    for result in model.results:
        measured = [megabytes(found) for found in map(result.measured.get, (OURS, ONE, BATCHED))]
        deviation = [f"{value:.2e}" for value in (result.deviation or {}).values()] or ["", ""]
        rows.append((result.row.case.label, *measured, *deviation))
    return rows


def comparisons_dict(report: comparisons.Report, command: list[str]) -> dict[str, Any]:
    """Of ``bench comparisons``, for JSON; seconds of an item and bytes, null where a figure is missing."""
    return {
        "command": command,
        "machine": comparisons_machine(report),
        "device": str(report.device),
        "reduced": report.plan.reduced or None,
        "interrupted": report.interrupted,
        "precision": report.precision.name,
        "rates": report.rates.as_dict(),
        "models": [
            {
                "name": model.name,
                "layers": model.config.text.num_hidden_layers,
                "blocks": model.config.vision.depth,
                "rows": [
                    {
                        "title": result.row.case.label,
                        "stage": result.row.case.stage,
                        "unit": result.row.unit,
                        "seconds_per_item": result.seconds,
                        "roofline_seconds_per_item": result.roofline,
                        "memory_bytes": {
                            how: found.memory and asdict(found.memory) for how, found in result.measured.items()
                        },
                        "ratios": result.ratios,
                        "deviation_from_fp32": result.deviation,
                        "published": result.row.published,
                        "errors": result.errors,
                    }
                    for result in model.results
                ],
            }
            for model in report.models
        ],
    }
