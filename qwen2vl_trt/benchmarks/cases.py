"""What to measure, as ``--shapes`` spells it: trtexec's ``name:value,name:value``, in a user's terms.

``448x448x8,1080x1920``             eight images of 448x448 and one of 1080x1920 (height x width) in one vision call
``batch:8,prompt:256,generate:64``  eight answers of 64 tokens, decoding together, to prompts of 256
``448x448,batch:4,generate:32``     four requests at a time, each with one image, answered by 32 tokens
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import groupby
from math import isqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import BenchmarkError, LimitError
from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules
from qwen2vl_trt.windows import Grid

PROMPT = "What is in the image?"
_NAMES = {  # what each stage can be told
    "processor": {"image"},
    "vision": {"image"},
    "decoder": {"batch", "prompt", "generate"},
    "pipeline": {"image", "batch", "generate"},
}
_IMAGE = re.compile(r"(?:image:)?(\d+)x(\d+)(?:x(\d+))?")
_NUMBER = re.compile(r"(batch|prompt|generate):(\d+)")
_SIDE, _PROMPT_TOKENS, _ANSWER_TOKENS, _BATCHES = 448, 128, 32, (1, 8)  # by default
Size = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """One item of ``--shapes``; what it does not say is None, or no image.

    Attributes:
        images: (height, width) of each image.
        batch: answers that decode together, or requests at a time.
        prompt: tokens of each prompt.
        generate: tokens of each answer.
    """

    images: tuple[Size, ...] = ()
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
        images: list[Size] = []
        numbers: dict[str, int] = {}
        for part in text.split(","):
            if image := _IMAGE.fullmatch(part):
                height, width, count = (int(value) for value in (image[1], image[2], image[3] or "1"))
                images += [(height, width)] * count
            elif number := _NUMBER.fullmatch(part):
                if number[1] in numbers:
                    raise BenchmarkError(f"--shapes {text}: {number[1]} is given twice")
                height = width = count = numbers[number[1]] = int(number[2])
            else:
                raise BenchmarkError(
                    f"--shapes {text}: {part!r} is neither an image (448x448, 448x448x8 for eight) nor batch:N,"
                    " prompt:N or generate:N"
                )
            if 0 in (height, width, count):
                raise BenchmarkError(f"--shapes {text}: {part!r} has a 0")
        return cls(tuple(images), **numbers)


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        stage: ``processor``, ``vision``, ``decoder``, ``pipeline``, or ``hidden states`` of the decoder for a prompt
            with an image.
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
    sizes: tuple[Size, ...] = ()
    grids: tuple[Grid, ...] = ()
    batch: int = 1
    prompt: int = 0
    generate: int = 0
    on_device: bool = False

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grids)

    def make_images(self, device: torch.device) -> list[Tensor]:
        """``[3, H, W]`` uint8 each, on the device where the case says so; the same for every system."""
        arrays = (np.array(_picture(size, seed)) for seed, size in enumerate(self.sizes * self.batch))
        place = device if self.on_device else "cpu"
        return [torch.from_numpy(array).permute(2, 0, 1).contiguous().to(place) for array in arrays]

    def make_patches(self, width: int, dtype: torch.dtype) -> Tensor:
        """Random patches ``[P, width]`` in Transformers' order."""
        return torch.randn(self.patches, width, generator=torch.Generator().manual_seed(0)).to(dtype)

    def make_files(self, request: int = 0) -> list[bytes]:
        """The images of a request as JPEG files."""
        files = []
        for place, size in enumerate(self.sizes):
            buffer = BytesIO()
            _picture(size, request * len(self.sizes) + place).save(buffer, "JPEG", quality=90)
            files.append(buffer.getvalue())
        return files


def _picture(size: Size, seed: int) -> Image.Image:
    """Smooth noise."""
    height, width = size
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Limits:
    """What the engines and the preprocessor allow."""

    profile: BuildProfile
    vision: VisionConfig
    settings: PreprocessorSettings = field(default_factory=PreprocessorSettings)

    def default_size(self) -> Size:
        """448 x 448, or the largest square below that is neither resized nor refused."""
        factor = self.vision.image_factor
        side = min(isqrt(self.profile.max_hw_dims) * self.vision.patch_size, isqrt(self.settings.image.max_pixels))
        side = max(min(_SIDE, side) // factor * factor, factor)
        return side, side


def cases(stages: Sequence[str], shapes: Sequence[Shape], limits: Limits) -> list[Case]:
    """What to measure: each stage takes the shapes that it understands whole, or default ones where there is none.

    Raises:
        BenchmarkError: a shape that none of the stages takes.
        LimitError: a shape outside the engines' profile.
        MediaError: an image of an impossible aspect ratio.
    """
    for shape in shapes:
        if not any(shape.names <= _NAMES[stage] for stage in stages):
            named = ", ".join(f"{stage} takes {' and '.join(sorted(_NAMES[stage]))}" for stage in stages)
            raise BenchmarkError(f"--shapes with {' and '.join(sorted(shape.names))} fits no stage: {named}")
    return [
        _case(stage, shape, limits)
        for stage in stages
        for shape in [shape for shape in shapes if shape.names <= _NAMES[stage]] or _default_shapes(stage, limits)
    ]


def _default_shapes(stage: str, limits: Limits) -> list[Shape]:
    size, profile, of_images = limits.default_size(), limits.profile, stage in ("processor", "vision")
    most = profile.max_batch_size if of_images else profile.max_num_seqs
    batches = sorted({min(batch, most) for batch in (*_BATCHES, most)})
    if of_images:
        return [Shape((size,) * batch) for batch in batches[:2]]
    return [Shape((size,) if stage == "pipeline" else (), batch) for batch in batches]


def _case(stage: str, shape: Shape, limits: Limits) -> Case:
    profile, batch = limits.profile, shape.batch or 1
    if stage == "decoder":
        generate = shape.generate or min(_ANSWER_TOKENS, profile.max_seq_len - 1)
        prompt = shape.prompt or max(min(_PROMPT_TOKENS, profile.max_input_len, profile.max_seq_len - generate), 1)
        _check("batch", batch, profile.max_num_seqs, "--max-num-seqs")
        _check("prompt", prompt, profile.max_input_len, "--max-input-len")
        _check("prompt and answer", prompt + generate, profile.max_seq_len, "--max-seq-len")
        label = f"batch:{batch},prompt:{prompt},generate:{generate}"
        return Case(stage, label, batch=batch, prompt=prompt, generate=generate)
    images = shape.images or (limits.default_size(),)
    strict = replace(limits.settings, profile=profile, strict_size=True)  # to measure what was asked for
    rules = SizeRules(limits.vision, strict)
    if stage == "vision":
        _check("images of one call", len(images), profile.max_batch_size, "--max-batch-size")
    elif stage == "pipeline":
        _check("batch", batch, profile.max_num_seqs, "--max-num-seqs")
    grids = tuple(rules.image(*size, name=f"--shapes: image {number}").grid for number, size in enumerate(images, 1))
    runs = [(size, len(list(group))) for size, group in groupby(images)]  # 448x448x8,1080x1920
    label = ",".join(f"{height}x{width}" + (f"x{count}" if count > 1 else "") for (height, width), count in runs)
    if stage != "pipeline":
        return Case(stage, label, images, grids)
    generate = shape.generate or _ANSWER_TOKENS
    return Case(stage, f"{label},batch:{batch},generate:{generate}", images, grids, batch, generate=generate)


def _check(name: str, value: int, most: int, option: str) -> None:
    if value > most:
        raise LimitError(
            f"--shapes: {name} of {value:,}; these engines take {most:,} ({option}). Ask for less, or rebuild."
        )
