"""Vision, prefill and decode at published widths with random weights, as shares of the rates measured before."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qwen2vl_trt.benchmarks.cases import Case
from qwen2vl_trt.benchmarks.comparisons import case_of
from qwen2vl_trt.benchmarks.measure import Measurement, Until
from qwen2vl_trt.benchmarks.random_model import config_of, random_checkpoint, tensor_shapes
from qwen2vl_trt.benchmarks.roofline import Rates, bounds_of
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.precision import Precision
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.planning.counts import kv_bytes_per_token

from .finding import NO_TIME, Finding

UNTIL = Until(warm_up=None, duration=1.0, iterations=2)
_RUNS, _REACHED = 3, 0.5
"""Of a case, the one that prepares it included; and the share of the limit that is expected."""
_DEPTHS = (None, 8, 2)
"""Layers of the decoder and blocks of the vision tower: all, 8 or 2."""
_DRAWN = 25e6
"""Weights that each of at most 8 cores draws and writes a second."""
_BUILT = 10e6
"""Weights of a plan that TensorRT builds a second: a guess."""
_SPARE = 1.5
"""Memory over that of weights and cache."""
NO_ROOM = "no memory or disk space left"


@dataclass(frozen=True)
class RandomModel:
    """A published shape, cut to so many layers and vision blocks; None of them are all."""

    name: str
    layers: int | None

    @property
    def label(self) -> str:
        widths = self.name.removeprefix("Qwen2.5-VL-")
        return widths if self.layers is None else f"{widths}, {self.layers} layers"

    @property
    def config(self) -> Qwen2VLConfig:
        return Qwen2VLConfig.from_dict(config_of(self.name, self.layers, self.layers))

    @property
    def weights(self) -> int:
        return sum(map(math.prod, tensor_shapes(config_of(self.name, self.layers, self.layers)).values()))

    def build_seconds(self, plans: bool) -> float:
        """About what :func:`build_random` takes."""
        drawn = self.weights / (_DRAWN * min(os.cpu_count() or 1, 8))
        return 10 + drawn + (self.weights / _BUILT if plans else 0.0)

    def fits(self, precision: Precision, cuda: bool, memory: float, disk: float) -> bool:
        """Whether it runs in so many bytes; a build may copy the weights once."""
        profile = profile_of(cuda)
        cache = profile.max_num_seqs * profile.max_seq_len * kv_bytes_per_token(self.config.text, 4)
        needed = _SPARE * (self.weights * precision.decoder.itemsize + cache)
        return needed <= memory and 2 * 2 * self.weights <= disk


def profile_of(cuda: bool) -> BuildProfile:
    """Limits of the engines; on a GPU the cache of all slots is allocated."""
    return BuildProfile(4, 16384, 8, 64 if cuda else 4, 1024, 2048)


def deepest(
    name: str, precision: Precision, plans: bool, cuda: bool, rates: Rates, seconds: float, memory: float, root: Path
) -> RandomModel | Finding:
    """The deepest model that fits the memory, the disk and a time, or why none does.

    The shallowest needs time for its build alone.
    """
    free = shutil.disk_usage(root).free
    for model in (RandomModel(name, layers) for layers in _DEPTHS):
        needed = model.build_seconds(plans)
        if model.layers != _DEPTHS[-1]:
            needed += sum(seconds_of(case, model.config, precision, rates) for case in cases_of(cuda))
        if needed <= seconds and model.fits(precision, cuda, memory, free):
            return model
    return Finding("skipped", NO_TIME if model.fits(precision, cuda, memory, free) else NO_ROOM)


def seconds_of(case: Case, config: Qwen2VLConfig, precision: Precision, rates: Rates) -> float:
    """About what measuring a case takes."""
    bounds = {figure: bound.seconds for figure, bound in bounds_of(case, config, precision, rates).items() if bound}
    once = bounds.get("latency", 0.0) + case.batch * bounds.get("prefill", 0.0)
    once += (case.generate - 1) * bounds.get("time_between_tokens", 0.0)
    return 2 * UNTIL.duration + _RUNS * once / _REACHED


def build_random(model: RandomModel, backend: str, precision: str, cuda: bool, root: Path) -> Path:
    """Write the weights and build the engines; returns their folder."""
    checkpoint = random_checkpoint(model.name, model.layers, model.layers, root)
    folder = root / f"{checkpoint.name}-{backend}"
    resolved = ResolvedModel(checkpoint.name, checkpoint)
    build_engines(resolved, *find_backend(backend, precision), profile_of(cuda), folder)
    return folder


def cases_of(cuda: bool) -> list[Case]:
    """What is measured: a vision call, then a prompt's prefill and decoding."""
    images, prompt, generate, batches = (8, 512, 32, (1, 64)) if cuda else (1, 128, 8, (1, 4))
    vision = case_of("vision", f"vision, {images} of 448x448", ((448, 448),) * images)
    return [vision, *(case_of("decoder", f"batch {n}", batch=n, prompt=prompt, generate=generate) for n in batches)]


def findings_of(
    case: Case, found: Measurement, config: Qwen2VLConfig, precision: Precision, rates: Rates
) -> dict[str, Finding]:
    """Rows of a case, by name."""
    medians = {figure: values["median"] / 1e3 for figure, values in found.statistics.items()}
    bounds = bounds_of(case, config, precision, rates)

    def row(figure: str, value: float, unit: str) -> Finding:
        bound = bounds.get(figure)
        share = bound.seconds / medians[figure] if bound else None
        return Finding("measured", "", value, unit, share, bound.limit if bound else "")

    if case.stage == "vision":
        return {case.label: row("latency", medians["latency"] * 1e3 / len(case.sizes), "ms/image")}
    step = case.batch / medians["time_between_tokens"]
    rows = {f"decode, {case.label}": row("time_between_tokens", step, "tokens/s")}
    if case.batch == 1:
        rows = {f"prefill of {case.prompt} tokens": row("prefill", medians["prefill"] * 1e3, "ms")} | rows
    return rows
