"""Print what :mod:`qwen2vl_trt.engines.inspect` found."""

from __future__ import annotations

import re
from collections import Counter

from rich.console import Console
from rich.table import Table

from .inspect import FolderReport, GraphReport, TensorReport
from .tables import print_table


def print_report(report: FolderReport, console: Console, layers: bool = False) -> None:
    """Print one table a subject; with ``layers`` every layer by name instead of their number by type."""
    manifest = report.manifest
    about = _table("engine")
    about.add_row("model", manifest.model)
    if manifest.lora:
        about.add_row("adapter", f"{manifest.lora.name} ({manifest.lora.hash[:12]}), merged")
    about.add_row("backend", f"{manifest.backend}, {manifest.precision}")
    about.add_row("built with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    for name, value in manifest.options.items():
        about.add_row(name, str(value))
    _print(about, console)
    limits = _table("limits")
    for name, value in report.limits:
        limits.add_row(name, value)
    _print(limits, console)
    for graph in report.graphs:
        _print_graph(graph, console, layers)
    files = _table("files", "MB", "")
    for file in report.files:
        shared = "weights, " + ("hard-linked" if file.linked else "a copy of their own")
        if file.name.endswith(".engine"):
            stripped = manifest.options.get("strip_weights")
            where = "kernels; weights are read from the safetensors" if stripped else "kernels and weights"
        else:
            where = shared if file.name.endswith(".safetensors") else ""
        files.add_row(file.name, f"{file.bytes / 1e6:,.2f}", where)
    _print(files, console)
    if report.verified:
        built = ", ".join(sorted(manifest.files))
        read = [f"every byte of {built}"] if built else []
        read.append("of the weights the header and both ends of every tensor")  # see Checkpoint.hash
        console.print(f"as built: {'; '.join(read)}")


def _print_graph(graph: GraphReport, console: Console, layers: bool) -> None:
    table = _table(f"{graph.name} graph", "type", "shape")
    for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for names, tensor in _grouped(tensors):
            table.add_row(f"{direction}  {names}", tensor.dtype, " x ".join(map(str, tensor.shape)))
    _print(table, console)
    if layers:
        named = _table(f"{graph.name} layer", "operator", "type")
        for layer in graph.layers:
            named.add_row(*layer)
        _print(named, console)
    else:
        precision = _table(f"{graph.name} computes", "type", "layers")
        for (operator, dtype), count in sorted(Counter(layer[1:] for layer in graph.layers).items()):
            precision.add_row(operator, dtype, str(count))
        _print(precision, console)
    for name, ranges in graph.profiles.items():
        profile = _table(f"{graph.name}, profile {name}", "least", "usual", "most")
        for dimension, sizes in ranges.items():
            profile.add_row(dimension, *(f"{size:,}" for size in sizes))
        _print(profile, console)


def _grouped(tensors: tuple[TensorReport, ...]) -> list[tuple[str, TensorReport]]:
    """Tensors that differ only in the layer's number, as one: ``k_cache_0..35``."""
    groups: dict[tuple[str, tuple[int | str, ...], str], list[TensorReport]] = {}
    for tensor in tensors:
        stem = re.sub(r"_\d+$", "_", tensor.name)
        groups.setdefault((stem, tensor.shape, tensor.dtype), []).append(tensor)
    return [
        (first.name if len(members) == 1 else f"{first.name}..{members[-1].name.rpartition('_')[2]}", first)
        for members in groups.values()
        for first in members[:1]
    ]


def _print(table: Table, console: Console) -> None:
    print_table(table, console)
    console.print()


def _table(title: str, *columns: str) -> Table:
    table = Table(title, *(columns or ("",)), box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right" if column.header in ("MB", "layers", "least", "usual", "most") else "left"
    return table
