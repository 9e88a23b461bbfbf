"""Random scenes of handwritten digits: images or a video, a question and its answer.

Every random choice comes from the generator that is passed in, so a seed reproduces a scene. Training shows single
digits, black on white and then in colours, then rows, then everything.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .digits import Digits, load_split

Pixels = NDArray[np.uint8]
"""``[height, width, 3]``"""

TASKS = ("read", "count", "two_images", "video")
FPS = 2.0
OTHER_FPS = (1.0, 4.0, 8.0, 24.0)  # seen in training only; 24 is what Transformers assumes where nothing is said
FRAMES_PER_DIGIT = 2
SMALLEST_CELL, LARGEST_CELL = 25, 70
"""Side of the square that a digit is drawn in; the digit is 8/9 as high: 22 to 62 pixels."""
MERGE_GROUP = 28 * 28
MIN_AREA, MAX_AREA = 4 * MERGE_GROUP, 48 * MERGE_GROUP

# The first prompt of each list is the canonical one, which the evaluation uses.
READ_PROMPTS = (
    "What digits are in the image?",
    "Which digits are in the image?",
    "Read the digits in the image.",
    "What digits do you see?",
    "Read the image.",
    "What number is in the image?",
    "What digits are in this picture?",
)
COUNT_PROMPTS = (
    "How many digits are in the image?",
    "How many digits do you see?",
    "Count the digits in the image.",
    "How many digits are in this picture?",
)
FIRST_PROMPTS = (
    "What digits are in the first image?",
    "Which digits are in the first image?",
    "Read the first image.",
)
SECOND_PROMPTS = (
    "What digits are in the second image?",
    "Which digits are in the second image?",
    "Read the second image.",
)
BOTH_PROMPTS = (
    "What digits are in the images?",
    "Which digits are in the images?",
    "Read the images.",
    "Read both images.",
)
VIDEO_PROMPTS = (
    "What digits does the video show?",
    "Which digits does the video show?",
    "What digits are in the video?",
    "Read the digits in the video.",
)
CHATS = (
    ("Who are you?", "I am a tiny model that reads handwritten digits."),
    ("What are you?", "I am a tiny model that reads handwritten digits."),
    ("What can you do?", "I read handwritten digits in images and videos."),
    ("Hello", "Hello! Show me an image with digits."),
    ("Hi", "Hello! Show me an image with digits."),
    ("Thank you", "You are welcome."),
)


@dataclass(frozen=True)
class Scene:
    """One case: a user's messages with their images and videos, and the right answer."""

    task: str
    messages: list[dict[str, Any]]
    images: list[Pixels]
    videos: list[tuple[list[Pixels], float]]
    answer: str


@dataclass(frozen=True)
class Style:
    """How far digits are distorted when they are drawn; angles in degrees, the rest relative to the digit's size."""

    rotate: float
    shear: float
    scale: float
    shift: float
    warp: float
    blend: float
    speckle: float
    thickness: float
    sharpness: tuple[float, float]


PLAIN = Style(
    rotate=4, shear=0, scale=0.05, shift=0.02, warp=0, blend=0, speckle=0, thickness=0.1, sharpness=(1.1, 1.8)
)
"""The digits nearly as they are: for evaluation."""

AUGMENTED = Style(
    rotate=12,
    shear=0.18,
    scale=0.15,
    shift=0.05,
    warp=0.045,
    blend=0.3,
    speckle=0.08,
    thickness=0.25,
    sharpness=(1.1, 2.5),
)
"""Strong distortion: for training."""


def draw_digit(rng: np.random.Generator, digits: Digits, label: int, size: int, style: Style) -> NDArray[np.float32]:
    """Draw one digit of ``label``; returns its ink ``[size, size]`` from 0 to 1."""
    members = digits.by_label[label]
    ink = digits.images[members[rng.integers(len(members))]]
    if rng.random() < style.blend:
        other = digits.images[members[rng.integers(len(members))]]
        weight = rng.uniform(0.5, 1)
        ink = weight * ink + (1 - weight) * other
    if style.speckle:
        ink = ink + rng.normal(0, style.speckle * rng.random(), ink.shape) * (ink > 0.05)
    # A border of two empty pixels keeps strokes at the edge of the 8x8 from being cut off.
    source = np.zeros((12, 12), np.float32)
    source[2:10, 2:10] = ink
    jitter = rng.uniform(-1, 1, 6)
    angle = np.deg2rad(style.rotate * jitter[0])
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1, style.shear * jitter[1]], [0, 1]])
    matrix = matrix / (1 + style.scale * jitter[2:4]) * (9.0 / size)  # target pixels to source pixels
    centre = 6 + 9 * style.shift * jitter[4:6]
    picture = Image.fromarray(source)
    if style.warp:
        nodes = np.stack(np.meshgrid(*[np.array([0, size // 2, size])] * 2), -1)  # [3, 3, (x, y)]
        mapped = (nodes - size / 2) @ matrix.T + centre + rng.uniform(-1, 1, (3, 3, 2)) * 9 * style.warp
        mesh = []
        for row in range(2):
            for column in range(2):
                box = (*nodes[row, column].tolist(), *nodes[row + 1, column + 1].tolist())
                corners = mapped[[row, row + 1, row + 1, row], [column, column, column + 1, column + 1]]
                mesh.append((box, tuple(corners.ravel().tolist())))
        drawn = picture.transform((size, size), Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)
    else:
        offset = centre - matrix @ np.full(2, size / 2)
        data = (*matrix[0].tolist(), float(offset[0]), *matrix[1].tolist(), float(offset[1]))
        drawn = picture.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    # Sharpen the soft strokes; the threshold decides how thick they come out. A low one closes the holes of 8 and 6.
    threshold = 0.48 * (1 + style.thickness * rng.uniform(-1, 1))
    gain = rng.uniform(*style.sharpness)
    ink = np.clip((np.asarray(drawn) - threshold) * gain + 0.5, 0, 1)
    return ink.astype(np.float32)


@lru_cache(maxsize=1)
def _noise_tile() -> NDArray[np.float32]:
    """A fixed field of unit noise ``[1024, 1024]`` to cut pieces from: drawing fresh noise costs more than the rest."""
    return np.random.Generator(np.random.PCG64(7)).standard_normal((1024, 1024), dtype=np.float32)


@dataclass(frozen=True)
class Look:
    """Colours of one picture: ink and paper ``[3]`` from 0 to 255, the paper's gradient, and the noise's strength."""

    ink: NDArray[np.float32]
    paper: NDArray[np.float32]
    gradient: float
    noise: float


BLACK_ON_WHITE = Look(np.zeros(3, np.float32), np.full(3, 255, np.float32), gradient=0, noise=0)


def random_look(rng: np.random.Generator) -> Look:
    """Choose colours that a person tells apart easily, dark on light or light on dark."""
    kind = rng.random()
    if kind < 0.3:
        ink, paper = np.array([20.0, 20, 20]), np.array([250.0, 250, 250])
    else:
        luma = np.array([0.299, 0.587, 0.114])
        while True:
            ink, paper = rng.uniform(0, 255, (2, 3))
            if abs(luma @ (ink - paper)) > 100:
                break
    if kind < 0.08:
        ink, paper = paper, ink
    noise = rng.uniform(0, 10) if rng.random() < 0.7 else 0.0
    return Look(ink.astype(np.float32), paper.astype(np.float32), float(rng.uniform(-20, 20)), float(noise))


def paint(rng: np.random.Generator, alpha: NDArray[np.float32], look: Look) -> Pixels:
    """Colour an ink map ``[height, width]``; returns ``[height, width, 3]`` uint8."""
    height, width = alpha.shape
    shade = np.linspace(-look.gradient, look.gradient, width, dtype=np.float32)[None, :]
    if look.noise:
        top, left = rng.integers(0, 1024 - height + 1), rng.integers(0, 1024 - width + 1)
        shade = shade + look.noise * _noise_tile()[top : top + height, left : left + width]
    colour = alpha[:, :, None] * (look.ink - look.paper) + look.paper
    colour += np.broadcast_to(shade, alpha.shape)[:, :, None] + 0.5
    return np.clip(colour, 0, 255).astype(np.uint8)


def random_canvas(rng: np.random.Generator, width: int, height: int, max_area: int) -> tuple[int, int]:
    """Choose a canvas that holds a row of ``width`` x ``height``: tight, square, wide or tall; ``(width, height)``."""
    floor = max(width * height, MIN_AREA)
    area = floor * (max(max_area / floor, 1.0) ** (rng.random() ** 2.5))
    aspect = (width / height, 1.0, rng.uniform(2, 5), rng.uniform(0.2, 0.5))[rng.integers(4)]
    canvas_width = max(width, round(np.sqrt(area * aspect)))
    canvas_height = max(height, round(area / canvas_width))
    if canvas_width * canvas_height > max_area:
        canvas_width = max(width, max_area // canvas_height)
        canvas_height = max(height, min(canvas_height, max_area // canvas_width))
    return int(canvas_width), int(canvas_height)


def draw_row(
    rng: np.random.Generator, digits: Digits, labels: list[int], style: Style, max_area: int = MAX_AREA
) -> NDArray[np.float32]:
    """Draw digits in a row on a random canvas; returns the ink ``[height, width]``."""
    count = len(labels)
    size = SMALLEST_CELL * (LARGEST_CELL / SMALLEST_CELL) ** (rng.random() ** 1.2)
    advance = rng.uniform(0.74, 1.05)
    # Long rows of large digits would fill the largest canvas: shrink them to leave some room.
    size = int(min(size, np.sqrt(0.8 * max_area / ((count - 1) * advance + 1)), 200))
    steps = np.round(np.arange(count) * advance * size).astype(int)
    lifts = np.round(rng.uniform(-0.1, 0.1, count) * size).astype(int)
    lifts -= lifts.min()
    row_width, row_height = int(steps[-1]) + size, size + int(lifts.max())
    width, height = random_canvas(rng, row_width, row_height, max_area)
    left, top = int(rng.integers(0, width - row_width + 1)), int(rng.integers(0, height - row_height + 1))
    alpha = np.zeros((height, width), np.float32)
    for label, step, lift in zip(labels, steps.tolist(), lifts.tolist(), strict=True):
        target = alpha[top + lift : top + lift + size, left + step : left + step + size]
        np.maximum(target, draw_digit(rng, digits, label, size, style), out=target)
    return alpha


def _labels(rng: np.random.Generator, low: int, high: int) -> list[int]:
    labels: list[int] = rng.integers(0, 10, rng.integers(low, high + 1)).tolist()
    return labels


def _join(labels: list[int]) -> str:
    return "".join(map(str, labels))


def _messages(media: list[str], text: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": kind} for kind in media]
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


def _pick(rng: np.random.Generator, prompts: tuple[str, ...], canonical: bool) -> str:
    if canonical or rng.random() < 0.5:
        return prompts[0]
    return prompts[rng.integers(len(prompts))]


def read_scene(
    rng: np.random.Generator,
    digits: Digits,
    style: Style,
    canonical: bool = True,
    most: int = 5,
    max_area: int = MAX_AREA,
    look: Look | None = None,
) -> Scene:
    """One to ``most`` digits in a row, to be read."""
    labels = _labels(rng, 1, most)
    image = paint(rng, draw_row(rng, digits, labels, style, max_area), look or random_look(rng))
    return Scene("read", _messages(["image"], _pick(rng, READ_PROMPTS, canonical)), [image], [], _join(labels))


def count_scene(
    rng: np.random.Generator, digits: Digits, style: Style, canonical: bool = True, max_area: int = MAX_AREA
) -> Scene:
    """One to five digits in a row, to be counted."""
    labels = _labels(rng, 1, 5)
    image = paint(rng, draw_row(rng, digits, labels, style, max_area), random_look(rng))
    return Scene("count", _messages(["image"], _pick(rng, COUNT_PROMPTS, canonical)), [image], [], str(len(labels)))


def two_images_scene(
    rng: np.random.Generator,
    digits: Digits,
    style: Style,
    canonical: bool = True,
    max_area: int = MAX_AREA,
    question: int | None = None,
) -> Scene:
    """Two images of different sizes; question 0 asks for the first, 1 for the second, 2 for both."""
    rows = [_labels(rng, 1, 3) for _ in range(2)]
    images = [paint(rng, draw_row(rng, digits, row, style, max_area // 2), random_look(rng)) for row in rows]
    first, second = map(_join, rows)
    chosen = int(rng.integers(3)) if question is None else question
    prompts = (FIRST_PROMPTS, SECOND_PROMPTS, BOTH_PROMPTS)[chosen]
    answer = (first, second, f"first image: {first}, second image: {second}")[chosen]
    return Scene("two_images", _messages(["image", "image"], _pick(rng, prompts, canonical)), images, [], answer)


def video_scene(rng: np.random.Generator, digits: Digits, style: Style, canonical: bool = True) -> Scene:
    """A video that shows one to four digits one after another, each two frames long."""
    labels = _labels(rng, 1, 4)
    size = int(rng.integers(26, 57))
    width, height = random_canvas(rng, size + 8, size + 8, 12 * MERGE_GROUP)
    look = random_look(rng)
    frames = []
    for label in labels:
        ink = draw_digit(rng, digits, label, size, style)
        left, top = int(rng.integers(0, width - size + 1)), int(rng.integers(0, height - size + 1))
        alpha = np.zeros((height, width), np.float32)
        alpha[top : top + size, left : left + size] = ink
        frames += [paint(rng, alpha, look) for _ in range(FRAMES_PER_DIGIT)]
    messages = _messages(["video"], _pick(rng, VIDEO_PROMPTS, canonical))
    fps = FPS if canonical or rng.random() < 0.6 else float(rng.choice(OTHER_FPS))
    return Scene("video", messages, [], [(frames, fps)], _join(labels))


def chat_scene(rng: np.random.Generator) -> Scene:
    """A question without any picture."""
    question, answer = CHATS[rng.integers(len(CHATS))]
    return Scene("chat", _messages([], question), [], [], answer)


def evaluation_scene(rng: np.random.Generator, digits: Digits, task: str, number: int) -> Scene:
    """Case ``number`` of a task as the evaluation asks it: canonical prompt, digits nearly as they are."""
    if task == "read":
        return read_scene(rng, digits, PLAIN)
    if task == "count":
        return count_scene(rng, digits, PLAIN)
    if task == "two_images":
        return two_images_scene(rng, digits, PLAIN, question=number % 3)
    if task == "video":
        return video_scene(rng, digits, PLAIN)
    raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")


def held_out_scenes(task: str, cases: int, seed: int) -> list[Scene]:
    """Draw ``cases`` scenes of held-out digits; the first n of them do not depend on ``cases``."""
    digits = load_split()[1]
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    return [evaluation_scene(rng, digits, task, number) for number in range(cases)]


BLACK_ON_WHITE_UNTIL = 600
SINGLE_DIGITS_UNTIL = 1000
ROWS_UNTIL = 1800


SIZE_CLASSES = ((0.65, 12, 40), (0.23, 24, 28), (0.12, 48, 20))
"""Probability, merge groups, scenes of a batch: like sizes share one, so that little of it is padding."""
TASK_MIX = {"read": 0.62, "count": 0.04, "two_images": 0.2, "video": 0.12, "chat": 0.02}


def training_scenes(seed: int, step: int) -> list[Scene]:
    """The scenes of a training step, which depend on these two numbers alone."""
    digits = load_split()[0]
    rng = np.random.default_rng([seed, step, 0])
    if step < SINGLE_DIGITS_UNTIL:
        look = BLACK_ON_WHITE if step < BLACK_ON_WHITE_UNTIL else None
        return [read_scene(rng, digits, PLAIN, most=1, max_area=6 * MERGE_GROUP, look=look) for _ in range(48)]
    if step < ROWS_UNTIL:
        return [
            read_scene(rng, digits, AUGMENTED, canonical=False, most=3, max_area=12 * MERGE_GROUP) for _ in range(64)
        ]
    shared = np.random.default_rng([seed, step])
    _, groups, batch = SIZE_CLASSES[shared.choice(len(SIZE_CLASSES), p=[chance for chance, *_ in SIZE_CLASSES])]
    tasks = rng.choice(list(TASK_MIX), batch, p=list(TASK_MIX.values()))
    return [_training_scene(rng, digits, str(task), groups * MERGE_GROUP) for task in tasks]


def _training_scene(rng: np.random.Generator, digits: Digits, task: str, max_area: int) -> Scene:
    if task == "chat":
        return chat_scene(rng)
    if task == "video":
        return video_scene(rng, digits, AUGMENTED, canonical=False)
    draws: dict[str, Callable[..., Scene]] = {
        "read": read_scene,
        "count": count_scene,
        "two_images": two_images_scene,
    }
    return draws[task](rng, digits, AUGMENTED, canonical=False, max_area=max_area)
