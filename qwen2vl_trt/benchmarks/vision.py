"""Our vision tower against Transformers': real width, 8 blocks, random weights; 448x448 and mixed sizes.

    python -m qwen2vl_trt.benchmarks.vision [--work-dir DIR] [--repetitions 3] [--json FILE]

The work directory (2 GB) keeps the random checkpoint between runs. Pixels are prepared beforehand.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from qwen2vl_trt.benchmarks.measure import Call, Contender, Sheet, option_parser, work_folder
from qwen2vl_trt.benchmarks.random_model import prepare
from qwen2vl_trt.benchmarks.subjects.transformers import load_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.windows import Grid, window_layout

CASES: dict[str, list[Grid]] = {
    "4 images of 448x448": [(1, 32, 32)] * 4,
    "4 images of mixed sizes": [(1, 60, 44), (1, 16, 22), (1, 10, 74), (1, 24, 30)],
}


def transformers_tower(checkpoint: Path, dtype: torch.dtype, grids: list[Grid], batched: bool) -> Call:
    """The tower alone, in patches as its own processor orders them; random pixels serve, the work is the same."""
    model = load_model(checkpoint, dtype, torch.device("cpu"))
    tower = model.model.visual
    del model.model.language_model, model.lm_head
    batches = [grids] if batched else [[grid] for grid in grids]
    inputs = [
        (torch.randn(sum(t * h * w for t, h, w in batch), 1176).to(tower.dtype), torch.tensor(batch))
        for batch in batches
    ]

    @torch.no_grad()
    def call() -> None:
        for pixels, image_grid_thw in inputs:
            tower(pixels, grid_thw=image_grid_thw)

    return call


def our_tower(folder: Path, grids: list[Grid], batched: bool) -> Call:
    """The vision engine alone."""
    engines = open_engines(folder, "cpu")
    vision = engines.checkpoint.config.vision
    layouts = [window_layout(tuple(batch), vision) for batch in ([grids] if batched else [[grid] for grid in grids])]
    inputs = [
        (torch.randn(*layout.sequence_position.shape, vision.qwen2_vl_dim).to(engines.dtype), layout)
        for layout in layouts
    ]

    def call() -> None:
        for pixels, layout in inputs:
            engines.vision(pixels, layout)

    return call


def main() -> None:
    options = option_parser(__doc__, repetitions=3, work_dir=True).parse_args()
    sheet = Sheet(options, "transformers", "onnxruntime")
    ways = {"one at a time": False, "batched": True}
    with work_folder(options) as folder:
        paths = prepare(folder)
        for title, grids in CASES.items():
            contenders = [
                Contender(
                    f"Transformers {name}, {how}",
                    partial(transformers_tower, paths["checkpoint"], dtype, grids, batched),
                )
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
                for how, batched in ways.items()
            ]
            contenders += [
                Contender(f"{name}, {how}", partial(our_tower, paths[name], grids, batched))
                for name in ("torch bf16", "torch fp32", "onnxruntime fp32")
                for how, batched in ways.items()
            ]
            sheet.compare(title, contenders, "ms/image", lambda seconds: seconds * 1e3 / 4)
    sheet.save()


if __name__ == "__main__":
    main()
