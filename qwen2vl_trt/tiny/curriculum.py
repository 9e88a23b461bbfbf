"""What is learnt when: single digits, black on white and then in colours, then rows, then everything.

A batch depends on the seed, the step and the process that draws it, and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import Dataset

from qwen2vl_trt.config import Qwen2VLConfig

from . import scenes
from .batching import Batch, Collator
from .digits import load_split
from .model import config_dict
from .scenes import AUGMENTED, BLACK_ON_WHITE, MERGE_GROUP, PLAIN, Scene
from .tokenizer import train_tokenizer

BLACK_ON_WHITE_UNTIL = 600
SINGLE_DIGITS_UNTIL = 1000
ROWS_UNTIL = 1800


@dataclass(frozen=True)
class SizeClass:
    """Scenes of like size share a batch, so that little of it is padding."""

    probability: float
    merge_groups: int
    batch_size: int


SIZE_CLASSES = (SizeClass(0.65, 12, 40), SizeClass(0.23, 24, 28), SizeClass(0.12, 48, 20))

TASK_MIX = {"read": 0.62, "count": 0.04, "two_images": 0.2, "video": 0.12, "chat": 0.02}


def training_scenes(seed: int, step: int, process: int = 0, processes: int = 1) -> list[Scene]:
    """The share of one process in the scenes of one training step."""
    digits = load_split()[0]
    rng = np.random.default_rng([seed, step, process])
    if step < SINGLE_DIGITS_UNTIL:
        look = BLACK_ON_WHITE if step < BLACK_ON_WHITE_UNTIL else None
        area = 6 * MERGE_GROUP
        return [scenes.read_scene(rng, digits, PLAIN, most=1, max_area=area, look=look) for _ in range(48 // processes)]
    if step < ROWS_UNTIL:
        area = 12 * MERGE_GROUP
        return [
            scenes.read_scene(rng, digits, AUGMENTED, canonical=False, most=3, max_area=area)
            for _ in range(64 // processes)
        ]
    # All processes take the same size class, so that none waits for another.
    shared = np.random.default_rng([seed, step])
    size = SIZE_CLASSES[shared.choice(len(SIZE_CLASSES), p=[c.probability for c in SIZE_CLASSES])]
    tasks = rng.choice(list(TASK_MIX), size.batch_size // processes, p=list(TASK_MIX.values()))
    return [_scene(rng, str(task), size.merge_groups * MERGE_GROUP) for task in tasks]


def _scene(rng: np.random.Generator, task: str, max_area: int) -> Scene:
    digits = load_split()[0]
    if task == "read":
        return scenes.read_scene(rng, digits, AUGMENTED, canonical=False, max_area=max_area)
    if task == "count":
        return scenes.count_scene(rng, digits, AUGMENTED, canonical=False, max_area=max_area)
    if task == "two_images":
        return scenes.two_images_scene(rng, digits, AUGMENTED, canonical=False, max_area=max_area)
    if task == "video":
        return scenes.video_scene(rng, digits, AUGMENTED, canonical=False)
    return scenes.chat_scene(rng)


class TrainingBatches(Dataset[Batch]):
    """The batch of each step, by its number."""

    def __init__(self, seed: int, batch_limit: int | None = None, process: int = 0, processes: int = 1) -> None:
        self.seed, self.batch_limit, self.process, self.processes = seed, batch_limit, process, processes

    @cached_property
    def collator(self) -> Collator:
        """Built where it is used, in the worker: a template cannot be sent there."""
        tokenizer = train_tokenizer()
        return Collator(Qwen2VLConfig.from_dict(config_dict(tokenizer)), tokenizer)

    def __getitem__(self, step: int) -> Batch:
        chosen = training_scenes(self.seed, step, self.process, self.processes)[: self.batch_limit]
        # Transformers 5 places the text after a long video differently: show the model both.
        reaching = np.random.default_rng([self.seed, step, self.process, 1]).random(len(chosen)) < 0.7
        return self.collator(chosen, reaching=reaching.tolist())
