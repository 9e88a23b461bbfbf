"""``run.py bench comparisons``: a fixed list of cases beside Transformers, with random weights of the published shapes.

The first three are those of Qwen2.5-VL-Batched, which takes images of one size, ``(B, cameras, 3, H, W)`` on the GPU,
and a list of texts, and returns the decoder's hidden states; its authors measured it on an A6000. The others are what
it cannot do. Our engines and Transformers run one after the other, because a large model may not fit twice, in the
torch backend's default precision; both outputs are compared with those of Transformers in FP32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen2vl_trt.accuracy.figures import measure as compare_arrays
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.precision import Precision
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.progress import progress_bar
from qwen2vl_trt.errors import Qwen2VLError
from qwen2vl_trt.hub import ResolvedModel

from .cases import Case, Size
from .engines import EngineOptions, EngineSystem
from .measure import Measurement, Until, measure
from .random_model import random_checkpoint
from .roofline import Rates, bounds_of, measure_rates
from .transformers import BATCHED, ONE, TransformersSystem
from .workers import Worker

OURS = "ours"
CPU_DEPTH = 4
"""Layers and blocks at most on a CPU, unless asked for."""
_UNTIL = Until(warm_up=None, duration=2.0, iterations=1)
_ALONE = 4  # requests of the row of many, where they run one at a time


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        case: what is measured; its label is the row's title.
        item: what a figure is of: ``image``, ``video``, ``sample``, ``token`` or ``request``.
        published: what the authors of Qwen2.5-VL-Batched state: milliseconds of Transformers, one at a time, and of
            theirs, and the ratio.
        compared: whether the outputs are, with Transformers in FP32.
    """

    case: Case
    item: str
    published: tuple[float, float, float] | None = None
    compared: bool = False

    @property
    def is_rate(self) -> bool:
        """Whether it is reported as items a second, not as milliseconds of one."""
        return self.item in ("token", "request")

    @property
    def unit(self) -> str:
        return f"{self.item}s/s" if self.is_rate else f"ms/{self.item}"

    @property
    def items(self) -> int:
        """Of a call."""
        return self.case.batch * max(len(self.case.sizes), 1)

    @property
    def ways(self) -> tuple[str, ...]:
        """In which Transformers can do it."""
        if self.case.stage == "decoder":
            return (BATCHED,)
        return (ONE, BATCHED) if self.items > 1 else (ONE,)

    def case_of(self, how: str) -> Case:
        """What one way runs: fewer of many requests, where they run one at a time."""
        few = self.case.stage == "pipeline" and how == ONE
        return replace(self.case, batch=min(self.case.batch, _ALONE)) if few else self.case


@dataclass(frozen=True)
class Plan:
    """Rows in the order of the report, the decoder's slots, and in words what is smaller than on a GPU."""

    rows: tuple[Row, ...]
    slots: int
    reduced: str = ""


@dataclass
class Result:
    """One row.

    Attributes:
        measured: ``ours``, and Transformers' by way; without those that failed.
        outputs: of the row's last item, ours and Transformers', where they are compared.
        tokens: of a prompt with its image, where the roofline needs it; 0 where it is not known.
        roofline: seconds of an item at least.
        deviation: mean relative error against Transformers in FP32: our engines', and that of Transformers itself.
        errors: what failed, and whose it is.
    """

    row: Row
    measured: dict[str, Measurement] = field(default_factory=dict)
    outputs: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    roofline: float | None = None
    deviation: dict[str, float] | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> dict[str, float]:
        """Of an item, likewise."""
        return {how: found.item_seconds(self.row.case_of(how)) for how, found in self.measured.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each way of Transformers."""
        ours = self.seconds.get(OURS)
        return {how: seconds / ours for how, seconds in self.seconds.items() if how != OURS} if ours else {}


@dataclass(frozen=True)
class ModelResults:
    """All rows of one model; ``name`` as the checkpoint's folder is called."""

    name: str
    config: Qwen2VLConfig
    results: list[Result]


@dataclass(frozen=True)
class Report:
    """Of one run; ``interrupted`` where it was ended before all was measured."""

    device: torch.device
    precision: Precision
    plan: Plan
    rates: Rates
    models: list[ModelResults]
    interrupted: bool = False


def run(models: list[str], device: torch.device, layers: int | None, blocks: int | None, root: Path) -> Report:
    """Measure every row of every model, or what there is time for until Ctrl-C.

    Args:
        models: keys of :data:`~qwen2vl_trt.published.SHAPES`.
        layers: of the decoder; by default all on a GPU.
        blocks: of the vision tower; likewise.
        root: where checkpoints and engines are left.

    Raises:
        BenchmarkError: too little space on the disk.
    """
    plan = plan_for(device.type)
    if device.type == "cpu":
        layers, blocks = layers or CPU_DEPTH, blocks or CPU_DEPTH
    backend, name = find_backend("torch", None, str(device))  # fp32 on a CPU without BF16, which would take hours
    precision = backend.precision(name)
    rates = measure_rates(device, precision.vision)
    measured: list[ModelResults] = []
    interrupted = False
    try:
        with progress_bar(lines=True) as progress:
            task = progress.add_task("preparing", total=2 * len(models) * len(plan.rows))

            def on_row(title: str) -> None:
                progress.update(task, description=title, advance=1)

            for name in models:
                progress.update(task, description=f"{name}: writing random weights")
                folder = random_checkpoint(name, layers, blocks, root / "checkpoints")
                model = ModelResults(folder.name, Checkpoint(folder).config, [Result(row) for row in plan.rows])
                measured.append(model)
                for measure_system in (partial(_measure_ours, plan, root), _measure_theirs):
                    measure_system(model, folder, str(device), precision, on_row)
                    # Again and again: a slow moment would make a roofline that engines pass.
                    rates = rates.best(measure_rates(device, precision.vision))
    except KeyboardInterrupt:
        interrupted = True
    for model in measured:
        for result in model.results:
            result.roofline = roofline_of(result.row, model.config, precision, rates, result.tokens)
    return Report(device, precision, plan, rates, measured, interrupted)


def _measure_ours(
    plan: Plan,
    root: Path,
    model: ModelResults,
    checkpoint: Path,
    device: str,
    precision: Precision,
    on_row: Callable[[str], None],
) -> None:
    profile = BuildProfile(4, 16384, plan.slots, plan.slots, 4096, 8192)
    folder = root / f"{model.name}-{precision.name}-comparisons-{plan.slots}"
    build_engines(ResolvedModel(model.name, checkpoint), *find_backend("torch", precision.name), profile, folder)
    system = partial(EngineSystem, EngineOptions(folder, device), preload=True)
    with Worker(f"our {model.name}", system) as worker:
        for result in model.results:
            row = result.row
            on_row(f"{model.name}: {row.case.label}")
            _measure(worker, result, OURS, row.compared)
            if row.case.stage == "hidden states" and result.outputs:
                result.tokens = len(result.outputs[-1])
            elif row.case.stage == "pipeline" and OURS in result.measured:
                result.tokens = worker.call("prompt_tokens")


def _measure_theirs(
    model: ModelResults, checkpoint: Path, device: str, precision: Precision, on_row: Callable[[str], None]
) -> None:
    system = partial(TransformersSystem, checkpoint, precision.name, precision.vision, device, whole=True)
    with Worker(f"Transformers' {model.name}", system) as worker:
        for result in model.results:
            row = result.row
            on_row(f"{model.name}, Transformers: {row.case.label}")
            for how in row.ways:
                _measure(worker, result, how, row.compared and how == row.ways[0])
        compared = [result for result in model.results if result.row.compared]
        for result in compared:
            try:
                reference = worker.call("reference", result.row.case)
            except Qwen2VLError as error:  # the process died, or FP32 does not fit
                result.errors.append(f"deviation: {_last_line(error)}")
                continue
            if len(result.outputs) == 2:
                found = (compare_arrays(output, reference, result.row.case.label) for output in result.outputs)
                result.deviation = dict(zip(("ours", "theirs"), (figures.mean_relative for figures in found)))


def _measure(worker: Worker, result: Result, how: str, compared: bool) -> None:
    """Measure one way of a row, or note its error: the others go on."""
    try:
        (found,) = measure(result.row.case_of(how), [worker], _UNTIL, how)
        if compared:
            result.outputs.append(worker.call("output"))
        result.measured[how] = found
    except Qwen2VLError as error:
        result.errors.append(f"{how if how == OURS else f'Transformers, {how}'}: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1][:200]


def roofline_of(row: Row, config: Qwen2VLConfig, precision: Precision, rates: Rates, tokens: int) -> float | None:
    """Seconds of an item at least; None where the length of its prompt is not known."""
    found = bounds_of(row.case, config, precision, rates, tokens)
    bound = found.get("time_between_tokens") or found.get("latency")
    return bound.seconds / row.items if bound else None


def case_of(stage: str, title: str, sizes: Sequence[Size] = (), frames: int = 0, **more: Any) -> Case:
    """A case on the device; sides of images, or of a video of ``frames``, rounded to whole merge groups of 28 pixels
    and never shrunk."""
    temporal = max(frames // 2, 1)
    grids = tuple((temporal, round(height / 28) * 2, round(width / 28) * 2) for height, width in sizes)
    return Case(stage, title, tuple(sizes), grids, on_device=True, **more)


def plan_for(device: str) -> Plan:
    """The whole of it on a GPU; on a CPU what two cores do in about three minutes."""
    if device == "cuda":
        return Plan(_rows(64, (200, 1500), 8, 448, (1, 8, 32, 128), (64, 448, 32)), slots=128)
    return Plan(
        _rows(4, (200, 700), 1, 224, (1, 8), (8, 224, 8)),
        slots=8,
        reduced=(
            "reduced for a CPU: fewer layers, 4 images for 64, 1 of 1080p for 8, frames of 224x224, batches up to 8,"
            " 8 requests for 64; compare ratios, not figures"
        ),
    )


def _rows(
    images: int,
    sides: Size,
    large: int,
    frame: int,
    batches: tuple[int, ...],
    requests: tuple[int, int, int],
) -> tuple[Row, ...]:
    square = ((448, 448),)
    numbers = random.Random(0)
    mixed = tuple((numbers.randint(*sides), numbers.randint(*sides)) for _ in range(images))
    concurrent, side, generate = requests
    tower, span = "vision encoder", f"{sides[0]} to {sides[1]} px"
    title = f"{concurrent} concurrent requests, {side}x{side}, {generate} tokens each"
    many = case_of("pipeline", title, ((side, side),), batch=concurrent, generate=generate)
    processor = case_of("processor", f"processor, {images} images of 448x448", square * images)
    vision = case_of("vision", f"{tower}, {images} images of 448x448", square * images)
    model = case_of("hidden states", "full model, batch 4, 448x448 and text", square, batch=4)
    video = case_of("vision", f"{tower}, video of 32 frames of {frame}x{frame}", ((frame, frame),), frames=32)
    return (
        Row(processor, "image", (10.32, 0.36, 28.3), compared=True),
        Row(vision, "image", (1142.8, 89.2, 12.8), compared=True),
        Row(model, "sample", (554.0, 372.7, 1.49), compared=True),
        Row(case_of("vision", f"{tower}, {images} images of mixed sizes, {span}", mixed), "image", compared=True),
        Row(case_of("vision", f"{tower}, 1080x1920, {large} at once", ((1080, 1920),) * large), "image"),
        Row(video, "video", compared=True),
        *(
            Row(case_of("decoder", f"decode, batch {batch}", batch=batch, prompt=128, generate=32), "token")
            for batch in batches
        ),
        Row(many, "request"),
    )
