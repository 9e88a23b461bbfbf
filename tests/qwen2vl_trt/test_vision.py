"""The vision tower over packed windows against Transformers' tower, on random weights of several shapes."""

from dataclasses import fields, replace

import pytest
import torch
from sklearn.datasets import load_sample_images
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import window_layout
from tests.support.models import (
    in_dtype,
    model_config,
    our_config,
    pack_windows,
    random_model,
    random_patches,
    relative_error,
    save_model,
)

GRIDS = [
    # merge groups: a single one, rows and columns of them, a window and one less or more
    *((1, 2 * rows, 2 * columns) for rows, columns in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 4), (4, 1), (1, 5)]),
    *((1, 2 * rows, 2 * columns) for rows, columns in [(3, 4), (4, 3), (4, 4), (5, 4), (4, 5), (5, 5), (3, 5), (7, 8)]),
    # whole windows, and one group past them in one direction or both
    *((1, 8 * rows, 8 * columns) for rows, columns in [(1, 2), (2, 1), (2, 2), (3, 2), (1, 4)]),
    *((1, 8 * rows + 2, 8 * columns) for rows, columns in [(2, 2), (1, 3), (3, 1)]),
    *((1, 8 * rows, 8 * columns + 2) for rows, columns in [(2, 2), (3, 1), (1, 4)]),
    *((1, 8 * rows + 2, 8 * columns + 2) for rows, columns in [(2, 2), (1, 3), (3, 1)]),
    # the narrowest pictures that the preprocessor lets through, and nearly
    (1, 2, 398),
    (1, 398, 2),
    (1, 4, 398),
    (1, 398, 4),
    (1, 2, 200),
    (1, 200, 2),
    # common photographs: 448x448, 420x308, 308x420
    (1, 32, 32),
    (1, 22, 30),
    (1, 30, 22),
    # videos
    (2, 2, 2),
    (4, 6, 10),
    (3, 8, 8),
    (2, 10, 16),
    (5, 2, 18),
    (2, 18, 18),
]
MIXED = [
    [(1, 2, 2), (1, 8, 8), (1, 10, 10), (1, 2, 40), (1, 26, 4), (1, 16, 16), (1, 6, 14), (1, 12, 22)],
    [(3, 4, 4), (1, 18, 8), (2, 10, 12), (1, 2, 2), (1, 8, 24), (4, 8, 2), (1, 14, 14), (1, 2, 398)],
    [(1, 8, 8)] * 8,
]
SHAPES = {
    "one head": {"num_heads": 1, "hidden_size": 32, "intermediate_size": 40},
    "head size 80, odd intermediate size": {
        "hidden_size": 320,
        "num_heads": 4,
        "intermediate_size": 855,
        "depth": 4,
        "fullatt_block_indexes": [3],
    },
    "every block full": {"fullatt_block_indexes": [0, 1, 2]},
    "no block full": {"fullatt_block_indexes": []},
    "full first and last": {"fullatt_block_indexes": [0, 4], "depth": 5, "num_heads": 8},
    "other patches and windows": {"patch_size": 7, "window_size": 42, "temporal_patch_size": 3, "in_channels": 1},
    "3B, 7B": {
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "depth": 2,
        "fullatt_block_indexes": [1],
    },
    "merge 3": {"spatial_merge_size": 3, "window_size": 84, "patch_size": 14},
}


def tower_of(model, folder, dtype=torch.float32):
    checkpoint = Checkpoint(save_model(model, folder))
    with torch.device("meta"):
        tower = VisionTransformer(checkpoint.config.vision).eval()
    load_weights(tower, checkpoint, "visual.", dtype)
    return tower


@torch.no_grad()
def embed(tower, patches, grids, config):
    layout = window_layout(tuple(grids), our_config(config).vision)
    indices = [getattr(layout, field.name) for field in fields(layout) if field.name != "tokens_per_item"]
    return tower(pack_windows(patches, grids, config), *indices)


@torch.no_grad()
def embed_by_transformers(model, patches, grids):
    return model.model.visual(patches, torch.tensor(grids)).pooler_output


@pytest.fixture(scope="module")
def model():
    return random_model(model_config())


@pytest.fixture(scope="module")
def tower(model, tmp_path_factory):
    return tower_of(model, tmp_path_factory.mktemp("vision"))


def test_there_are_forty_grids():
    assert len(set(GRIDS)) == len(GRIDS) >= 40


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_one_image_or_video_equals_transformers(model, tower, grid):
    patches = random_patches([grid], model.config)
    found = embed(tower, patches, [grid], model.config)
    expected = embed_by_transformers(model, patches, [grid])
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("grids", MIXED, ids=["images", "images and videos", "one size"])
def test_a_mixed_batch_equals_one_at_a_time(model, tower, grids):
    sizes = [t * h * w for t, h, w in grids]
    patches = random_patches(grids, model.config)
    batch = embed(tower, patches, grids, model.config)
    assert relative_error(batch, embed_by_transformers(model, patches, grids)) < 1e-5
    alone = [embed_by_transformers(model, part, [grid]) for part, grid in zip(patches.split(sizes), grids)]
    for found, expected in zip(batch.split([size // 4 for size in sizes]), alone):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_other_widths_and_windows_equal_transformers(shape, tmp_path):
    config = model_config(vision=SHAPES[shape])
    reference = random_model(config)
    merge = config.vision_config.spatial_merge_size
    grids = [(t, h * merge, w * merge) for t, h, w in [(1, 9, 6), (2, 4, 5), (1, 1, 1), (1, 3, 13)]]
    patches = random_patches(grids, config)
    found = embed(tower_of(reference, tmp_path), patches, grids, config)
    assert relative_error(found, embed_by_transformers(reference, patches, grids)) < 1e-5


def test_empty_slots_do_not_matter(model, tower):
    grids = [(1, 10, 6), (1, 2, 2)]
    patches = random_patches(grids, model.config)
    expected = embed(tower, patches, grids, model.config)
    layout = window_layout(tuple(grids), our_config(model.config).vision)
    indices = [getattr(layout, field.name) for field in fields(layout) if field.name != "tokens_per_item"]
    windows = pack_windows(patches, grids, model.config)
    windows[torch.arange(64) >= layout.window_lengths[:, None]] = 1e4
    with torch.no_grad():
        assert torch.equal(tower(windows, *indices), expected)


@pytest.mark.parametrize("fault", ["no windows", "a position", "an order"])
def test_the_tolerance_notices(model, tower, fault, monkeypatch):
    """Random weights can hide an error; these do not."""
    grids = [(1, 10, 10)]
    patches = random_patches(grids, model.config)
    windows = pack_windows(patches, grids, model.config)
    layout = window_layout(tuple(grids), our_config(model.config).vision)
    indices = [getattr(layout, field.name).clone() for field in fields(layout) if field.name != "tokens_per_item"]
    if fault == "no windows":
        everywhere = replace(tower.config, fullatt_block_indexes=tuple(range(len(tower.blocks))))
        monkeypatch.setattr(tower, "config", everywhere)
    elif fault == "a position":
        indices[1][0, 5] += 1
    else:
        windows[0, [3, 4]] = windows[0, [4, 3]]
    with torch.no_grad():
        found = tower(windows, *indices)
    assert relative_error(found, embed_by_transformers(model, patches, grids)) > 1e-3


@pytest.fixture(scope="module")
def photographs():
    """Two photographs as Transformers prepares them."""
    pictures = [picture.copy() for picture in load_sample_images().images]
    # Not min_pixels and max_pixels: given those alone, Transformers 5.17 changes the defaults of the whole class.
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 300 * 300})
    prepared = processor(images=pictures, return_tensors="pt")
    return prepared["pixel_values"], [tuple(grid) for grid in prepared["image_grid_thw"].tolist()]


def test_bf16_is_no_worse_than_transformers(tmp_path, photographs):
    patches, grids = photographs
    config = model_config(vision={"hidden_size": 160, "num_heads": 2, "intermediate_size": 428, "depth": 6})
    model = random_model(config)
    exact = embed(tower_of(model, tmp_path / "fp32"), patches, grids, config)
    low = patches.to(torch.bfloat16)
    ours = embed(tower_of(model, tmp_path / "bf16", torch.bfloat16), low, grids, config)
    theirs = embed_by_transformers(in_dtype(model, torch.bfloat16), low, grids)
    assert ours.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(ours.double().flatten(), exact.double().flatten(), dim=0)
    error, their_error = ((found.float() - exact).abs().mean() / exact.abs().mean() for found in (ours, theirs))
    assert cosine >= 0.9999
    assert error <= 1.05 * their_error  # measured 0.95 to 0.98 of it, by the kernels: of one model it is luck to 2%


def test_bf16_of_the_trained_tower_is_no_worse_than_transformers(tmp_path):
    """Training makes outliers that random weights lack; both photographs, whole and cut, in three sizes.

    By image the quotient of the two errors lies between 0.9 and 1.1, by the luck of rounding; so all are judged
    together, and 2% remain of it.
    """
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(resolve_model("tiny").folder, dtype=torch.float32)
    model, pictures = reference.eval(), load_sample_images().images
    cuts = [cut.copy() for picture in pictures for cut in (picture, picture[:, :300], picture[100:400, 200:600])]
    tower = tower_of(in_dtype(model, torch.bfloat16), tmp_path, torch.bfloat16)
    error = their_error = 0.0
    for side in (200, 300, 400):
        processor = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": side * side})
        prepared = processor(images=cuts, return_tensors="pt")
        patches, grids = prepared["pixel_values"], [tuple(grid) for grid in prepared["image_grid_thw"].tolist()]
        low = patches.to(torch.bfloat16)
        theirs = embed_by_transformers(in_dtype(model, torch.bfloat16), low, grids)
        exact = embed_by_transformers(in_dtype(model, torch.float32), patches, grids)
        ours = embed(tower, low, grids, model.config)
        assert torch.nn.functional.cosine_similarity(ours.double().flatten(), exact.double().flatten(), dim=0) >= 0.9999
        error += float((ours.float() - exact).abs().sum())
        their_error += float((theirs.float() - exact).abs().sum())
    assert error <= 1.02 * their_error
