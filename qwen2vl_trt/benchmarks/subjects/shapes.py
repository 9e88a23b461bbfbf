"""What to measure, as ``--shapes`` spells it: trtexec's ``name:value,name:value``, in a user's terms.

``448x448x8,1080x1920``             eight images of 448x448 and one of 1080x1920 (height x width) in one vision call
``batch:8,prompt:256,generate:64``  eight answers of 64 tokens, decoding together, to prompts of 256
``448x448,batch:4,generate:32``     four requests at a time, each with one image, answered by 32 tokens
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isqrt

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import BenchmarkError, LimitError
from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules
from qwen2vl_trt.windows import Grid

STAGES = ("vision", "decoder", "pipeline")
"""Measured where none is named."""
ALL_STAGES = ("processor", *STAGES)
_NAMES = {  # what each stage can be told
    "processor": {"image"},
    "vision": {"image"},
    "decoder": {"batch", "prompt", "generate"},
    "pipeline": {"image", "batch", "generate"},
}
_IMAGE = re.compile(r"(?:image:)?(\d+)x(\d+)(?:x(\d+))?")
_NUMBER = re.compile(r"(batch|prompt|generate):(\d+)")
_USUAL_SIDE, _USUAL_PROMPT, _USUAL_ANSWER = 448, 128, 32
_USUAL_BATCHES = (1, 8)


@dataclass(frozen=True)
class Shape:
    """One item of ``--shapes``; what it does not say is None, or no image.

    Attributes:
        images: (height, width) of each image.
        batch: answers that decode together, or requests at a time.
        prompt: tokens of each prompt.
        generate: tokens of each answer.
    """

    images: tuple[tuple[int, int], ...] = ()
    batch: int | None = None
    prompt: int | None = None
    generate: int | None = None

    @property
    def names(self) -> set[str]:
        """What it says."""
        numbers = {name for name in ("batch", "prompt", "generate") if getattr(self, name) is not None}
        return numbers | ({"image"} if self.images else set())

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read one.

        Raises:
            BenchmarkError: another spelling, a number of 0, or a name given twice.
        """
        images: list[tuple[int, int]] = []
        numbers: dict[str, int] = {}
        for part in text.split(","):
            image, number = _IMAGE.fullmatch(part), _NUMBER.fullmatch(part)
            values = [int(value) for value in (image or number or _no_match(text, part)).groups() if _digits(value)]
            if 0 in values:
                raise BenchmarkError(f"--shapes {text}: {part!r} has a 0")
            if image:
                height, width, *count = values
                images += [(height, width)] * (count[0] if count else 1)
            elif number and number[1] in numbers:
                raise BenchmarkError(f"--shapes {text}: {number[1]} is given twice")
            elif number:
                numbers[number[1]] = values[0]
        return cls(tuple(images), **numbers)


def _digits(value: str | None) -> bool:
    return value is not None and value.isdecimal()


def _no_match(text: str, part: str) -> re.Match[str]:
    raise BenchmarkError(
        f"--shapes {text}: {part!r} is neither an image (448x448, 448x448x8 for eight) nor batch:N, prompt:N or"
        " generate:N"
    )


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        stage: one of :data:`ALL_STAGES`, or ``hidden states``, of the decoder for a prompt with an image.
        label: its name in reports.
        sizes: (height, width) in pixels of the images of a call, or of a request.
        grids: of those images, after the preprocessor's resizing.
        batch: of the decoder; requests at a time of the pipeline.
        prompt: tokens; 0 where the pipeline's request decides.
        generate: tokens of an answer.
        on_device: inputs lie on the device and outputs stay there; else both are in the host's memory.
    """

    stage: str
    label: str
    sizes: tuple[tuple[int, int], ...] = ()
    grids: tuple[Grid, ...] = ()
    batch: int = 1
    prompt: int = 0
    generate: int = 0
    on_device: bool = False

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grids)


@dataclass(frozen=True)
class Limits:
    """What the engines and the preprocessor allow."""

    profile: BuildProfile
    vision: VisionConfig
    settings: PreprocessorSettings = field(default_factory=PreprocessorSettings)

    def usual_size(self) -> tuple[int, int]:
        """448 x 448, or the largest square below that is neither resized nor refused."""
        factor = self.vision.image_factor
        side = min(isqrt(self.profile.max_hw_dims) * self.vision.patch_size, isqrt(self.settings.image.max_pixels))
        side = max(min(_USUAL_SIDE, side) // factor * factor, factor)
        return side, side


def cases(stages: Sequence[str], shapes: Sequence[Shape], limits: Limits) -> list[Case]:
    """What to measure: each stage takes the shapes that it understands whole, or its usual ones where there is none.

    Raises:
        BenchmarkError: a shape that none of the stages takes.
        LimitError: a shape outside the engines' profile.
        MediaError: an image of an impossible aspect ratio.
    """
    for shape in shapes:
        if not any(shape.names <= _NAMES[stage] for stage in stages):
            named = ", ".join(f"{stage} takes {' and '.join(sorted(_NAMES[stage]))}" for stage in stages)
            raise BenchmarkError(f"--shapes with {' and '.join(sorted(shape.names))} fits no stage: {named}")
    found = []
    for stage in stages:
        taken = [shape for shape in shapes if shape.names <= _NAMES[stage]] or _usual(stage, limits)
        found += [_CASES[stage](shape, limits) for shape in taken]
    return found


def _usual(stage: str, limits: Limits) -> list[Shape]:
    size, most = limits.usual_size(), limits.profile.max_batch_size
    batches = sorted({min(batch, most) for batch in (*_USUAL_BATCHES, most)})
    if stage in ("processor", "vision"):
        return [Shape((size,) * batch) for batch in batches[:2]]
    return [Shape((size,) if stage == "pipeline" else (), batch) for batch in batches]


def _processor_case(shape: Shape, limits: Limits) -> Case:
    return Case("processor", _images_label(shape.images), shape.images, _grids(shape.images, limits))


def _vision_case(shape: Shape, limits: Limits) -> Case:
    _check("images of one call", len(shape.images), limits.profile.max_batch_size, "--max-batch-size")
    return Case("vision", _images_label(shape.images), shape.images, _grids(shape.images, limits))


def _decoder_case(shape: Shape, limits: Limits) -> Case:
    profile = limits.profile
    batch, generate = shape.batch or 1, shape.generate or min(_USUAL_ANSWER, profile.max_seq_len - 1)
    prompt = shape.prompt or max(min(_USUAL_PROMPT, profile.max_input_len, profile.max_seq_len - generate), 1)
    _check("batch", batch, profile.max_batch_size, "--max-batch-size")
    _check("prompt", prompt, profile.max_input_len, "--max-input-len")
    _check("prompt and answer", prompt + generate, profile.max_seq_len, "--max-seq-len")
    label = f"batch:{batch},prompt:{prompt},generate:{generate}"
    return Case("decoder", label, batch=batch, prompt=prompt, generate=generate)


def _pipeline_case(shape: Shape, limits: Limits) -> Case:
    images = shape.images or (limits.usual_size(),)
    batch, generate = shape.batch or 1, shape.generate or _USUAL_ANSWER
    _check("batch", batch, limits.profile.max_batch_size, "--max-batch-size")
    label = f"{_images_label(images)},batch:{batch},generate:{generate}"
    return Case("pipeline", label, images, _grids(images, limits), batch, generate=generate)


_CASES = {"processor": _processor_case, "vision": _vision_case, "decoder": _decoder_case, "pipeline": _pipeline_case}


def _images_label(images: Sequence[tuple[int, int]]) -> str:
    """As it would be spelled, counts joined: ``448x448x8,1080x1920``."""
    runs: list[tuple[tuple[int, int], int]] = []
    for size in images:
        if runs and runs[-1][0] == size:
            runs[-1] = size, runs[-1][1] + 1
        else:
            runs.append((size, 1))
    return ",".join(f"{height}x{width}" + (f"x{count}" if count > 1 else "") for (height, width), count in runs)


def _grids(images: Sequence[tuple[int, int]], limits: Limits) -> tuple[Grid, ...]:
    strict = replace(limits.settings, profile=limits.profile, strict_size=True)  # to measure what was asked for
    rules = SizeRules(limits.vision, strict)
    return tuple(
        rules.image(height, width, name=f"--shapes: image {number}").grid
        for number, (height, width) in enumerate(images, start=1)
    )


def _check(name: str, value: int, most: int, option: str) -> None:
    if value > most:
        raise LimitError(
            f"--shapes: {name} of {value:,}; these engines take {most:,} ({option}). Ask for less, or rebuild."
        )
