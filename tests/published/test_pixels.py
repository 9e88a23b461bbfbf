"""Pixels of the published preprocessor's settings, against Transformers' processor."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor
from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings
from tests.support.pictures import merge_order
from tests.support.published import config_json

SIZES = [(448, 448), (100, 100), (1, 1), (20, 31), (613, 847), (1362, 1724), (640, 480), (1920, 1080), (28, 2800)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_an_image_has_the_pixels_of_transformers(processor_folder, processor, size):
    config = Qwen2VLConfig.from_dict(config_json("3B")).vision
    preprocessor = Preprocessor(config, PreprocessorSettings.from_folder(processor_folder))
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = processor.image_processor(images=[Image.fromarray(values)], return_tensors="pt")
    found = preprocessor.preprocess([values])
    assert found.grids == (tuple(expected["image_grid_thw"][0].tolist()),)
    assert torch.equal(merge_order(found, config), expected["pixel_values"])
