"""Patches from Transformers' order into windows and back, and block outputs from both towers into one order."""

import pytest
import torch

from qwen2vl_trt.accuracy.recorder import Recorder, decoder_modules, in_patch_order, pack, vision_modules
from qwen2vl_trt.windows import unpad, window_layout
from tests.support.models import model_config, our_config, pack_windows, random_model, random_patches

GRIDS = ((1, 10, 6), (2, 8, 20), (1, 2, 2))


@pytest.fixture(scope="module")
def config():
    return model_config()


def test_windows_are_packed_as_transformers_orders_them(config):
    patches = random_patches(GRIDS, config)
    layout = window_layout(GRIDS, our_config(config).vision)
    assert torch.equal(pack(patches, layout, our_config(config).vision), pack_windows(patches, GRIDS, config))


def test_packed_windows_return_to_patch_order_with_and_without_empty_slots(config):
    vision = our_config(config).vision
    patches, layout = random_patches(GRIDS, config), window_layout(GRIDS, vision)
    packed = pack(patches, layout, vision)
    assert torch.equal(in_patch_order(packed, layout, vision), patches)
    filled = packed.flatten(0, 1)[unpad(layout, vision).filled]
    assert not torch.equal(filled, patches)
    assert torch.equal(in_patch_order(filled[None], layout, vision), patches)


def test_blocks_are_recorded_by_the_checkpoints_names(config):
    model = random_model(config).model
    recorder, tower = Recorder(), model.visual
    patches = random_patches(GRIDS, config)
    with recorder.listen(vision_modules(tower) | decoder_modules(model.language_model)), torch.no_grad():
        tower(patches, torch.tensor(GRIDS))
        model.language_model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    width = config.vision_config.hidden_size
    shapes = {name: [tuple(call.shape) for call in calls] for name, calls in recorder.calls.items()}
    assert shapes == {
        "visual.patch_embed": [(len(patches), width)],
        **{f"visual.blocks.{n}": [(len(patches), width)] for n in range(3)},
        **{f"model.layers.{n}": [(1, 3, config.text_config.hidden_size)] for n in range(2)},
    }
    with torch.no_grad():
        tower(patches, torch.tensor(GRIDS))
    assert len(recorder.calls["visual.blocks.0"]) == 1, "it listens only inside the with statement"
