"""What decides the outcome of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run, but for the code."""

    steps: int = 11000
    seed: int = 1
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: int = 1500
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999
    processes: int = 1
    batch_limit: int | None = None

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, long because a rate of 1e-3 at once never leaves the first plateau; then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        swing = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * swing
