"""A report as text for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..machine import gpu, machine, one_line
from ..subjects.subject import FIGURES
from .percentiles import Statistics
from .run import Measurement, Report, Result

_GPU_FIGURES = ("enqueue", "h2d", "compute", "d2h")
_COLUMNS = ("min", "max", "mean", "median", "p90", "p95", "p99")
_GB, _MB = 1e9, 1e6
NO_FP8_RATE = "torch multiplies no FP8 numbers on this GPU, so their rate is not known"


def text(report: Report) -> Iterator[str]:
    """Line by line."""
    engines, rates = report.engines, report.rates
    yield f"{engines.folder}: {engines.manifest.model}, {engines.manifest.backend} {engines.manifest.precision}"
    yield one_line(machine_of(report))
    yield f"measured in this run, {_dtype(report)}: {rates}{_fp8(report)}"
    for result in report.results:
        yield ""
        yield from _case(result)


def _fp8(report: Report) -> str:
    if not report.engines.precision.fp8 or report.engines.device.type == "cpu":
        return ""
    rate = report.rates.fp8_gemm
    return f", of FP8 {'n/a' if rate is None else f'{rate / _GB:,.0f} GFLOP/s'}"


def _case(result: Result) -> Iterator[str]:
    case = result.case
    patches = f" ({case.patches:,} patches{' a request' if case.stage == 'pipeline' else ''})" if case.grids else ""
    streams = f", {result.streams} streams" if result.streams > 1 else ""
    yield f"{case.stage} {case.label}{patches}{streams}"
    for measurement in (result.ours, result.rival):
        if measurement is not None:
            yield from _measurement(measurement, result)
    if result.rival is not None:
        ratios = (f"{FIGURES.get(name, name)} {ratio:.2f}x" for name, ratio in result.ratios.items())
        yield f"  against {result.rival.name}: " + ", ".join(ratios)


def _measurement(measurement: Measurement, result: Result) -> Iterator[str]:
    throughput = ", ".join(f"{value:,.2f} {unit}" for unit, value in measurement.throughput(result.case).items())
    how = f" ({measurement.how})" if measurement.how else ""
    name = f"  {measurement.name}{how}: {throughput}; {len(measurement.samples)} in {measurement.seconds:.1f} s"
    yield name
    yield f"    {'ms':<20}" + "".join(f"{column:>11}" for column in _COLUMNS)
    statistics = measurement.statistics
    for figure, label in FIGURES.items():
        if figure in statistics:
            values = statistics[figure]
            row = (values.min, values.max, values.mean, values.median, *values.percentiles.values())
            yield f"    {label:<20}" + "".join(f"{value:>11,.2f}" for value in row)
    if measurement is result.ours:
        if not any(figure in statistics for figure in _GPU_FIGURES):
            yield f"    {', '.join(FIGURES[figure] for figure in _GPU_FIGURES)}: n/a (no CUDA events)"
        for figure, floor in result.floors.items():
            if floor is None:
                yield f"    floor of {FIGURES[figure]}: n/a ({NO_FP8_RATE})"
                continue
            work = floor.work
            yield (
                f"    floor of {FIGURES[figure]}: {floor.seconds * 1e3:,.2f} ms, by {floor.bound}"
                f" ({work.flops / _GB:,.2f} GFLOP, {work.bytes / _MB:,.1f} MB);"
                f" {result.reached(figure, floor):.0%} reached"
            )
    if measurement.stages:
        yield "    " + ", ".join(f"{stage} {share:.1%}" for stage, share in measurement.shares.items())
    if (memory := measurement.memory) is not None:
        device = "n/a" if memory.device is None else f"{memory.device / _MB:,.0f} MB"
        yield f"    peak memory: host {memory.host / _MB:,.0f} MB, device {device}"


def as_dict(report: Report, command: list[str]) -> dict[str, Any]:
    """For JSON; what was not measured is null."""
    engines = report.engines
    return {
        "command": command,
        "interrupted": report.ended_by is not None,
        "machine": machine_of(report),
        "engines": {
            "folder": str(engines.folder),
            "model": engines.manifest.model,
            "backend": engines.manifest.backend,
            "precision": engines.manifest.precision,
            "device": str(engines.device),
            "profile": engines.manifest.profile.as_dict(),
        },
        "rates": {"dtype": _dtype(report), **report.rates.as_dict()},
        "results": [_result(result) for result in report.results],
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        "stage": result.case.stage,
        "shape": result.case.label,
        "patches": result.case.patches or None,
        "batch": result.case.batch,
        "streams": result.streams,
        "ours": _figures(result.ours, result),
        "rival": None if result.rival is None else _figures(result.rival, result),
        "ratios": result.ratios,
        "floors": {
            figure: floor
            and {
                "flops": floor.work.flops,
                "bytes": floor.work.bytes,
                "ms": floor.seconds * 1e3,
                "bound": floor.bound,
                "reached": result.reached(figure, floor),
            }
            for figure, floor in result.floors.items()
        },
    }


def _figures(measurement: Measurement, result: Result) -> dict[str, Any]:
    statistics = measurement.statistics
    return {
        "name": measurement.name,
        "how": measurement.how or None,
        "iterations": len(measurement.samples),
        "seconds": measurement.seconds,
        "throughput": measurement.throughput(result.case),
        "milliseconds": {figure: _statistics(statistics.get(figure)) for figure in FIGURES},
        "shares": measurement.shares or None,
        "memory_bytes": measurement.memory and asdict(measurement.memory),
    }


def _statistics(values: Statistics | None) -> dict[str, float] | None:
    if values is None:
        return None
    found = {name: getattr(values, name) for name in ("count", "min", "max", "mean", "median")}
    return found | {f"p{number}": value for number, value in values.percentiles.items()}


def machine_of(report: Report) -> dict[str, Any]:
    """Processor, GPU where it ran on one, and versions."""
    versions = report.engines.manifest.versions
    rivals = ["transformers"] if any(result.rival for result in report.results) else []
    return (
        gpu(report.engines.device) | machine(*rivals) | {name: versions[name] for name in versions if name != "torch"}
    )


def _dtype(report: Report) -> str:
    return str(report.engines.dtype).removeprefix("torch.")


def times(report: Report) -> list[dict[str, Any]]:
    """Every sample (``--export-times``), in milliseconds; names as trtexec's where it has them."""
    found = []
    for result in report.results:
        for measurement in (result.ours, result.rival):
            if measurement is not None:
                found.append(
                    {
                        "stage": result.case.stage,
                        "shape": result.case.label,
                        "name": measurement.name,
                        "iterations": [
                            {_TIMES[name]: _milliseconds(values) for name, values in sample.items() if values}
                            for sample in measurement.samples
                        ],
                    }
                )
    return found


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


def _milliseconds(values: list[float]) -> float | list[float]:
    found = [1e3 * value for value in values]
    return found[0] if len(found) == 1 else found


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
