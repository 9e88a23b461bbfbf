"""A media embedder over a vision engine that computes next to nothing and notes its calls."""

from dataclasses import replace

import numpy as np

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.runtime.media.embedder import MediaEmbedder
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor, PreprocessorSettings
from tests.support.models import model_config

CONFIG = Qwen2VLConfig.from_dict(model_config().to_dict()).vision
PROFILE = BuildProfile(min_hw_dims=16, max_hw_dims=400, max_batch_size=3)


class FakeEngine:
    """Gives every merged token the mean of the window that it comes from.

    Attributes:
        calls: sequences of each call.
        pairs: of patches that padded attention computes, in all calls.
    """

    padded = True

    def __init__(self):
        self.calls, self.pairs = [], 0

    def __call__(self, pixel_values, layout):
        self.calls.append(len(layout.sequence_lengths))
        self.pairs += layout.sequence_index.numel() * layout.sequence_index.shape[1]
        assert len(pixel_values) == len(layout.window_lengths)
        groups = pixel_values.shape[1] // CONFIG.merge_unit
        return pixel_values.mean((1, 2))[layout.merge_index // groups][:, None]


def embedder(min_pixels=3136, max_pixels=100_000, strict_size=False, profile=PROFILE):
    settings = PreprocessorSettings(profile=profile, strict_size=strict_size).with_limits(min_pixels, max_pixels)
    settings = replace(settings, video=replace(settings.video, min_pixels=3136, max_pixels=100_000))
    engine = FakeEngine()
    return MediaEmbedder(Preprocessor(CONFIG, settings), engine, profile, CONFIG), engine


def picture(number, height=56, width=84):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
