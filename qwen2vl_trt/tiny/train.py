"""Train the tiny checkpoint: ``python -m qwen2vl_trt.tiny.train``.

An interrupted run continues where it stopped when it is started again with the same ``--work-dir``. Needs the
``train`` extra (scikit-learn, for its handwritten digits).
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.files import atomic_file

from .batching import Batch, Collator
from .card import write_card
from .curriculum import TrainingBatches
from .evaluation import Score, evaluate, held_out_scenes
from .model import TinyModel, config_dict, save_checkpoint
from .optimizer import MasterWeights
from .recipe import Recipe
from .scenes import TASKS, Scene
from .tokenizer import train_tokenizer, write_processor_files

LOGGER = logging.getLogger("qwen2vl_trt.tiny.train")
CHECKPOINT_FOLDER = Path(__file__).parent / "checkpoint"
MONITOR_SEED = 1234


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
        """Continue from a saved state, if there is one. Batches depend on the step alone, so nothing else is needed."""
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


def greedy(model: TinyModel, collator: Collator, scenes: Sequence[Scene], max_tokens: int = 40) -> list[str]:
    """Answer scenes greedily."""
    return [collator.tokenizer.decode(ids) for ids in greedy_ids(model, collator, scenes, max_tokens)]


@torch.no_grad()
def greedy_ids(model: TinyModel, collator: Collator, scenes: Sequence[Scene], max_tokens: int) -> list[list[int]]:
    """Token ids of the answers, recomputing everything for each: slow, simple, and independent of the runtime."""
    answers: list[list[int]] = [[] for _ in scenes]
    open_rows = list(range(len(scenes)))
    while open_rows and len(answers[open_rows[0]]) < max_tokens:
        # The padding token stands for the one to be predicted.
        batch = collator([scenes[i] for i in open_rows], answers=[[*answers[i], collator.padding] for i in open_rows])
        predicted = model(batch).argmax(-1)
        last = batch.target_rows.diff(append=torch.tensor([-1])).nonzero().squeeze(1)
        still_open = []
        for row, token in zip(open_rows, predicted[last].tolist(), strict=True):
            if token != collator.end:
                answers[row].append(token)
                still_open.append(row)
        open_rows = still_open
    return answers


def measure(trainer: Trainer, cases: int, seed: int) -> dict[str, Score]:
    """Held-out accuracy of the averaged weights, rounded to BF16 as they are saved, computed in FP32."""
    model = TinyModel(trainer.model.config)
    with trainer.weights.averaged():
        model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in trainer.model.state_dict().items()})
    return evaluate(lambda scenes: greedy(model, trainer.collator, scenes), cases=cases, seed=seed, batch_size=50)


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
    export_minutes: float = 15,
    export_folder: Path | None = None,
) -> None:
    """Run the recipe to its end, or for ``stop_after`` steps.

    Args:
        trainer: where to start from.
        work_dir: gets ``state.pt`` and ``curve.csv``.
        stop_after: steps to run now; all that are left by default.
        monitor_every: steps between two looks at held-out scenes.
        monitor_cases: scenes a task of such a look.
        save_minutes: minutes between two saved states.
        export_minutes: minutes between two early checkpoints, written once half of the rows are read right.
        export_folder: where these go.
    """
    recipe = trainer.recipe
    end = recipe.steps if stop_after is None else min(recipe.steps, trainer.step + stop_after)
    process, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = TrainingBatches(recipe.seed, recipe.batch_limit, process, processes)
    asked = {task: held_out_scenes(task, monitor_cases, MONITOR_SEED) for task in TASKS}
    started = last_saved = time.monotonic()
    last_export, spent = started, trainer.seconds
    losses: list[float] = []
    while trainer.step < end:
        loss, norm = trainer.train_step(batches[trainer.step])
        if process:
            continue
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
            if export_folder and exact["read"] >= 50 and now - last_export > 60 * export_minutes:
                trainer.export(export_folder)
                last_export = now
        if now - last_saved > 60 * save_minutes:
            trainer.save(work_dir / "state.pt")
            last_saved = now
    if not process:
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
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each that share a batch")
    parser.add_argument("--export-minutes", type=float, default=15, help="minutes between early checkpoints")
    parser.add_argument("--cases", type=int, default=1000, help="held-out cases a task at the end")
    arguments = parser.parse_args()
    if arguments.processes == 1:
        _run(0, arguments, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (arguments, f"file://{folder}/rendezvous"), nprocs=arguments.processes)


def _run(process: int, arguments: argparse.Namespace, rendezvous: str | None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # One thread a process: threads that wait for each other in every small operation crawl on a busy machine.
    torch.set_num_threads(1)
    if rendezvous:
        dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=arguments.processes)
    recipe = Recipe(
        steps=arguments.steps,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        processes=arguments.processes,
    )
    trainer = Trainer(recipe)
    if trainer.resume(arguments.work_dir / "state.pt"):
        LOGGER.info("process %d resumes at step %d", process, trainer.step)
    train(trainer, arguments.work_dir, export_minutes=arguments.export_minutes, export_folder=arguments.output)
    if process:
        return
    trainer.export(arguments.output)
    scores = measure(trainer, arguments.cases, seed=0)
    for task, score in scores.items():
        LOGGER.info("%s: %.1f%% exact, %.1f%% by digit, %d cases", task, score.exact, score.per_digit, score.cases)
    curve, notes = arguments.work_dir / "curve.csv", arguments.work_dir / "notes.md"
    write_card(arguments.output, recipe, trainer.seconds, trainer.model, scores, curve, notes)


if __name__ == "__main__":
    main()
