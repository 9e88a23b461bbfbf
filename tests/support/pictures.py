"""Pixels for the preprocessor's tests: images in every form that memory holds them in, and mixes of sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.runtime.preprocessing.settings import PixelSettings, PreprocessorSettings

CONFIG = VisionConfig(
    depth=1, hidden_size=16, num_heads=1, intermediate_size=16, out_hidden_size=16, fullatt_block_indexes=(0,)
)
TINY = VisionConfig(
    depth=1,
    hidden_size=16,
    num_heads=1,
    intermediate_size=16,
    out_hidden_size=16,
    fullatt_block_indexes=(0,),
    patch_size=2,
    window_size=16,
)
TINY_SETTINGS = PreprocessorSettings(
    image=PixelSettings(60, 1500), video=PixelSettings(60, 900, image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.5))
)


def noise(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def natural(height, width, seed=0):
    """Noise of several scales, so that resizing overshoots at some edges and is smooth elsewhere."""
    layers = [noise(max(1, height // scale), max(1, width // scale), seed + scale) for scale in (1, 9, 40)]
    up = [torch.nn.functional.interpolate(layer[None].float(), (height, width))[0] for layer in layers]
    return (0.1 * up[0] + 0.3 * up[1] + 0.6 * up[2]).round().to(torch.uint8)


def merge_order(packed, config=CONFIG):
    """``[patches, D]`` in Transformers' order, the windows undone by the layout's ``merge_index``."""
    groups = packed.pixel_values.reshape(-1, config.merge_unit, config.qwen2_vl_dim)
    return groups[packed.layout.merge_index].reshape(-1, config.qwen2_vl_dim)


def in_form(image, form):
    """The same picture as memory may hold it: channels apart or together, grey, a part of a larger one."""
    if form == "hwc":
        return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if form == "grey":
        return image[:1]
    if form == "crop":
        return torch.nn.functional.pad(image, (3, 2, 1, 4))[:, 1:-4, 3:-2]
    return image


@dataclass(frozen=True)
class Mix:
    """What one call of the preprocessor gets."""

    images: list[torch.Tensor]
    videos: list[list[torch.Tensor]]

    def __repr__(self):
        return f"{[tuple(image.shape) for image in self.images]}, {[(len(v), *v[0].shape) for v in self.videos]}"


@st.composite
def sizes(draw, largest=300):
    side = st.one_of(st.sampled_from([1, 2, 3, 4, 16, 32, 36, 40]), st.integers(1, 60), st.integers(61, largest))
    height, width = draw(side), draw(side)
    return min(height, 200 * width), min(width, 200 * height)


@st.composite
def mixes(draw):
    """Up- and downscaling, none, strips, sides of one pixel, borders of every width, odd numbers of frames."""
    forms = st.sampled_from(["chw", "hwc", "grey", "crop"])
    images = [in_form(natural(*draw(sizes()), seed=i), draw(forms)) for i in range(draw(st.integers(0, 4)))]
    videos = []
    for _ in range(draw(st.integers(0 if images else 1, 2))):
        size, form = draw(sizes(80)), draw(forms)
        videos.append([in_form(natural(*size, seed=i), form) for i in range(draw(st.integers(1, 4)))])
    return Mix(images, videos)
