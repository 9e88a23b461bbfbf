"""What ``bench comparisons`` measures: the seed implementation's three comparisons, and what it cannot do.

The seed is Qwen2.5-VL-Batched. It takes images of one size, ``(B, cameras, 3, H, W)`` on the GPU, and a list of texts,
and returns the decoder's hidden states; its figures were measured on an A6000.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..subjects.shapes import Case

BATCHED, ONE = "batched", "one at a time"
Size = tuple[int, int]


@dataclass(frozen=True)
class Published:
    """What the seed's authors state: milliseconds of Transformers, one at a time, and of the seed, and the ratio."""

    before: float
    after: float
    ratio: float


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        case: what is measured; its label is the row's title.
        item: what a figure is of: ``image``, ``video``, ``sample``, ``token`` or ``request``.
        published: the seed's figure, where there is one.
        compared: whether the outputs are, with Transformers in FP32.
    """

    case: Case
    item: str
    published: Published | None = None
    compared: bool = False

    @property
    def is_rate(self) -> bool:
        """Whether it is reported as items a second, not as milliseconds of one."""
        return self.item in ("token", "request")

    @property
    def unit(self) -> str:
        return f"{self.item}s/s" if self.is_rate else f"ms/{self.item}"

    @property
    def ways(self) -> tuple[str, ...]:
        """In which Transformers can do it."""
        if self.case.stage == "decoder":
            return (BATCHED,)
        return (ONE, BATCHED) if len(self.case.sizes) * self.case.batch > 1 else (ONE,)


def case_of(
    stage: str,
    title: str,
    sizes: Sequence[Size] = (),
    frames: int = 0,
    batch: int = 1,
    prompt: int = 0,
    generate: int = 0,
) -> Case:
    """A case on the device; sides of images, or of a video of ``frames``, rounded to whole merge groups of 28 pixels
    and never shrunk."""
    temporal = max(frames // 2, 1)
    grids = tuple((temporal, round(height / 28) * 2, round(width / 28) * 2) for height, width in sizes)
    return Case(stage, title, tuple(sizes), grids, batch, prompt, generate, on_device=True)


@dataclass(frozen=True)
class Plan:
    """Rows, and how much of each a machine runs.

    Attributes:
        rows: in the order of the report.
        slots: of the decoder.
        reduced: what is smaller than on a GPU, in words; empty on a GPU.
    """

    rows: tuple[Row, ...]
    slots: int
    reduced: str = ""


def plan_for(device: str) -> Plan:
    """The whole of it on a GPU; on a CPU what two cores do in about three minutes."""
    if device == "cuda":
        return Plan(_rows(64, 64, (200, 1500), 8, 448, (1, 8, 32, 128), (64, 448, 32)), slots=128)
    return Plan(
        _rows(4, 4, (200, 700), 1, 224, (1, 8), (8, 224, 8)),
        slots=8,
        reduced=(
            "reduced for a CPU: fewer layers, 4 images for 64, 1 of 1080p for 8, frames of 224x224, batches up to 8,"
            " 8 requests for 64; compare ratios, not figures"
        ),
    )


def _rows(
    images: int,
    mixed: int,
    sides: tuple[int, int],
    large: int,
    frame: int,
    batches: tuple[int, ...],
    requests: tuple[int, int, int],
) -> tuple[Row, ...]:
    square = ((448, 448),)
    numbers = random.Random(0)
    sizes = tuple((numbers.randint(*sides), numbers.randint(*sides)) for _ in range(mixed))
    concurrent, side, generate = requests
    return (
        Row(
            case_of("processor", f"processor, {images} images of 448x448", square * images),
            "image",
            Published(10.32, 0.36, 28.3),
            compared=True,
        ),
        Row(
            case_of("vision", f"vision encoder, {images} images of 448x448", square * images),
            "image",
            Published(1142.8, 89.2, 12.8),
            compared=True,
        ),
        Row(
            case_of("hidden states", "full model, batch 4, 448x448 and text", square, batch=4),
            "sample",
            Published(554.0, 372.7, 1.49),
            compared=True,
        ),
        Row(
            case_of("vision", f"vision encoder, {mixed} images of mixed sizes, {sides[0]} to {sides[1]} px", sizes),
            "image",
            compared=True,
        ),
        Row(case_of("vision", f"vision encoder, 1080x1920, {large} at once", ((1080, 1920),) * large), "image"),
        Row(
            case_of("vision", f"vision encoder, video of 32 frames of {frame}x{frame}", ((frame, frame),), frames=32),
            "video",
            compared=True,
        ),
        *(
            Row(case_of("decoder", f"decode, batch {batch}", batch=batch, prompt=128, generate=32), "token")
            for batch in batches
        ),
        Row(
            case_of(
                "pipeline",
                f"{concurrent} concurrent requests, {side}x{side}, {generate} tokens each",
                ((side, side),),
                batch=concurrent,
                generate=generate,
            ),
            "request",
        ),
    )
