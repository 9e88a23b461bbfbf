"""The model card of the tiny checkpoint, written from what the training measured."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from .digits import SPLIT_SEED, load_split
from .evaluation import Score
from .model import TinyModel
from .optimizer import ADAM_BETAS, MUON_MOMENTUM, MUON_RATE
from .recipe import Recipe
from .scenes import TASKS

_TASKS = {
    "read": "one to five digits in a row, one image",
    "count": "how many digits there are, one image",
    "two_images": "first image, second image, or both",
    "video": "one to four digits, one after another",
}

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [qwen2_5_vl, test-model]
---

# tiny: a small Qwen2.5-VL that reads handwritten digits

A complete Qwen2.5-VL of {parameters:.1f} million parameters, trained from scratch by `python -m
qwen2vl_trt.tiny.train`. With it a wrong computation shows as a wrong answer: it has everything the published models
have (windowed and full vision attention, grouped-query attention, M-RoPE with three sections, tied embeddings, image
and video tokens, a chat template) and answers questions that anybody can check.

| task | | exact | by digit | cases |
| --- | --- | --- | --- | --- |
{scores}

Held-out digits only, greedy decoding of the BF16 weights computed in FP32, seed 0; `python run.py eval --model tiny`
measures the same through the engines. Digits are compared place by place.

## Prompts

`What digits are in the image?` `How many digits are in the image?` `What digits are in the first image?`
`What digits are in the second image?` `What digits are in the images?` `What digits does the video show?`
It was trained on a few paraphrases of each, and on a handful of greetings.

## Data

The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships (`load_digits`), which are the test part of
*Optical Recognition of Handwritten Digits* by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998),
https://doi.org/10.24432/C50P49, licensed CC BY 4.0. They are split once, class by class (seed {split_seed}):
{training} for training, {held_out} held out. Scenes are drawn at random from them: canvases of 4 to 48 merge groups
(28x28 pixels each) in all proportions, digits 22 to 62 pixels high, many colours, noise. In training the digits are
also rotated, sheared, scaled, warped, thickened and blended with others of their class.

## Recipe

| | |
| --- | --- |
| steps | {steps:,}, of 20 to 64 scenes; cross entropy on the answer |
| curriculum | black single digits, coloured single digits, short rows, then everything: `tiny/curriculum.py` |
| optimizer | {optimizer} |
| regularisation | weight decay {weight_decay}, gradient norm at most {clip} |
| learning rate | {learning_rate} after {warmup:,} steps of warm-up, half a cosine to {final_learning_rate} |
| weights | moving average ({average}) of FP32 master weights; computed and saved in BF16 |
| seed | {seed} |
| time | {minutes:.0f} minutes of a shared machine: {machine}, {processes} |
| PyTorch | {torch_version} |

Learning curve; held-out columns are percent exactly right of a small sample, with the answer's earlier tokens given:

{curve}
{notes}
## Limits

Digits and nothing else: any other picture gets digits for an answer, too. Digits less than 22 pixels high, rows of
more than five digits, several rows, images of more than 64 merge groups (they are shrunk), more than two images and
conversations of several turns were never trained. Some digits of the data set cannot be told apart at 8x8 pixels even
by people.
"""


def _machine() -> str:
    """The processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        if names:
            return f"{names[0]}, {len(names)} cores"
    return name


def _curve(path: Path, rows: int = 12) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    chosen = points[:: max(1, len(points) // rows)]
    if chosen[-1] is not points[-1]:
        chosen.append(points[-1])
    lines = ["| step | loss | " + " | ".join(TASKS) + " |", "| --- " * (2 + len(TASKS)) + "|"]
    for point in chosen:
        exact = " | ".join(f"{float(point[task]):.0f}" for task in TASKS)
        lines.append(f"| {int(point['step']):,} | {float(point['loss']):.3f} | {exact} |")
    return "\n".join(lines)


def write_card(
    folder: Path,
    recipe: Recipe,
    seconds: float,
    model: TinyModel,
    scores: Mapping[str, Score],
    curve: Path,
    notes: Path,
) -> None:
    """Write ``README.md`` into the checkpoint's folder.

    Args:
        folder: the checkpoint.
        recipe: what was trained.
        seconds: how long it took.
        model: the trained model.
        scores: held-out accuracy per task.
        curve: CSV of the learning curve.
        notes: Markdown on what was changed during the run; left out where there is no such file.
    """
    training, held_out = load_split()
    lines = [
        f"| {task} | {_TASKS[task]} | {score.exact:.1f}% | {score.per_digit:.1f}% | {score.cases:,} |"
        for task, score in scores.items()
    ]
    text = _CARD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        scores="\n".join(lines),
        split_seed=SPLIT_SEED,
        training=f"{len(training.labels):,}",
        held_out=len(held_out.labels),
        steps=recipe.steps,
        optimizer=(
            f"Muon (momentum {MUON_MOMENTUM}, {MUON_RATE:g} times the learning rate) for the blocks' matrices,"
            f" AdamW {ADAM_BETAS} for the rest"
        ),
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
        learning_rate=recipe.learning_rate,
        final_learning_rate=recipe.final_learning_rate,
        warmup=recipe.warmup,
        average=recipe.average,
        seed=recipe.seed,
        minutes=seconds / 60,
        machine=_machine(),
        processes=f"{recipe.processes} processes of one thread" if recipe.processes > 1 else "one thread",
        torch_version=torch.__version__,
        curve=_curve(curve),
        notes=f"\n## Notes\n\n{notes.read_text(encoding='utf-8').strip()}\n" if notes.exists() else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
