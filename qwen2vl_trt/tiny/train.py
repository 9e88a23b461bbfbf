"""Train the tiny checkpoint: ``python -m qwen2vl_trt.tiny.train``.

An interrupted run continues where it stopped when it is started again with the same ``--work-dir``. Needs the
``train`` extra (scikit-learn, for its handwritten digits).
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.files import atomic_file

from .batching import Batch, Collator
from .model import TinyModel, config_dict, save_checkpoint
from .optimizer import MasterWeights
from .scenes import TASKS, Scene, held_out_scenes, training_scenes
from .tokenizer import train_tokenizer, write_processor_files

LOGGER = logging.getLogger("qwen2vl_trt.tiny.train")
CHECKPOINT_FOLDER = Path(__file__).parent / "checkpoint"
MONITOR_SEED = 1234


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a training run, besides the code."""

    steps: int = 11000
    seed: int = 1
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: int = 1500
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999
    batch_limit: int | None = None

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, long because a rate of 1e-3 at once never leaves the first plateau; then half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        swing = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * swing


class Trainer:
    """Model, optimizer and the place in the recipe."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> None:
        self.recipe = recipe
        self.tokenizer = train_tokenizer()
        self.config = config_dict(self.tokenizer)
        torch.manual_seed(recipe.seed)
        self.model = TinyModel(Qwen2VLConfig.from_dict(self.config))
        self.collator = Collator(self.model.config, self.tokenizer)
        self.weights = MasterWeights(self.model, dtype, recipe.weight_decay, recipe.average)
        self.step = 0
        self.seconds = 0.0

    def next_batch(self) -> Batch:
        """The step's batch, which depends on the seed and the step alone."""
        seed = self.recipe.seed
        chosen = training_scenes(seed, self.step)[: self.recipe.batch_limit]
        # Transformers 5 places the text after a long video differently: show the model both.
        reaching = np.random.default_rng([seed, self.step, 0, 1]).random(len(chosen)) < 0.7
        return self.collator(chosen, reaching=reaching.tolist())

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm."""
        # On a CPU the fused attention's backward is several times slower than plain matrix products.
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(self.model(batch), batch.targets)
            loss.backward()
        norm = self.weights.step(self.recipe.learning_rate_at(self.step), self.recipe.clip, self.step)
        self.step += 1
        return loss.item(), norm

    def save(self, path: Path) -> None:
        """Write the state for :meth:`resume`; whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights.state_dict(), "step": self.step, "seconds": self.seconds}
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> bool:
        """Continue from a saved state, if there is one."""
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.weights.load_state_dict(state["weights"])
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    @torch.no_grad()
    def monitor(self, asked: dict[str, list[Scene]]) -> dict[str, float]:
        """Percent exactly right per task, averaged weights, every answer token given the right ones before it."""
        with self.weights.averaged():
            return {task: self._exact(scenes) for task, scenes in asked.items()}

    def _exact(self, scenes: list[Scene], batch_size: int = 64) -> float:
        wrong = 0
        for start in range(0, len(scenes), batch_size):
            batch = self.collator(scenes[start : start + batch_size])
            missed = self.model(batch).argmax(-1) != batch.targets
            wrong += len(batch.target_rows[missed].unique())
        return 100 - 100 * wrong / len(scenes)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint, with tokenizer and processor files."""
        write_processor_files(folder)
        with self.weights.averaged():
            save_checkpoint(self.model, self.config, folder)


def _append(path: Path, row: dict[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row.keys())
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def train(
    trainer: Trainer,
    work_dir: Path,
    *,
    stop_after: int | None = None,
    monitor_every: int = 500,
    monitor_cases: int = 100,
    save_minutes: float = 2,
) -> None:
    """Run the recipe to its end, or for ``stop_after`` steps.

    Args:
        work_dir: gets ``state.pt`` and ``curve.csv``.
        monitor_every: steps between two looks at held-out scenes, ``monitor_cases`` of each task.
        save_minutes: minutes between two saved states.
    """
    recipe = trainer.recipe
    end = recipe.steps if stop_after is None else min(recipe.steps, trainer.step + stop_after)
    asked = {task: held_out_scenes(task, monitor_cases, MONITOR_SEED) for task in TASKS}
    started = last_saved = time.monotonic()
    spent = trainer.seconds
    losses: list[float] = []
    while trainer.step < end:
        loss, norm = trainer.train_step(trainer.next_batch())
        losses.append(loss)
        now = time.monotonic()
        trainer.seconds = spent + now - started
        if trainer.step % 50 == 0:
            LOGGER.info(
                "step %d loss %.4f norm %.2f %.0f s", trainer.step, sum(losses[-50:]) / 50, norm, trainer.seconds
            )
        if trainer.step % monitor_every == 0:
            exact = trainer.monitor(asked)
            row = {"step": trainer.step, "seconds": round(trainer.seconds), "loss": sum(losses) / len(losses), **exact}
            row["learning_rate"] = recipe.learning_rate_at(trainer.step)
            losses.clear()
            work_dir.mkdir(parents=True, exist_ok=True)
            _append(work_dir / "curve.csv", row)
            LOGGER.info("held out, exact: %s", ", ".join(f"{task} {value:.0f}%" for task, value in exact.items()))
        if now - last_saved > 60 * save_minutes:
            trainer.save(work_dir / "state.pt")
            last_saved = now
    trainer.save(work_dir / "state.pt")


def main() -> None:
    """The command."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("artifacts/tiny-training"), help="state and curve")
    parser.add_argument("--output", type=Path, default=CHECKPOINT_FOLDER, help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--learning-rate", type=float, default=recipe.learning_rate)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    trainer = Trainer(Recipe(steps=arguments.steps, seed=arguments.seed, learning_rate=arguments.learning_rate))
    if trainer.resume(arguments.work_dir / "state.pt"):
        LOGGER.info("resumes at step %d", trainer.step)
    train(trainer, arguments.work_dir)
    trainer.export(arguments.output)
    LOGGER.info("measure it with: python run.py eval --model %s", arguments.output)


if __name__ == "__main__":
    main()
