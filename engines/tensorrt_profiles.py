"""Optimisation profiles: the range of every dynamic dimension that the limits of an engine allow.

A dimension's range is that of all legal batches together. TensorRT checks each dimension on its own, so a batch that
fits every range is taken, and every legal batch fits (``tests/engines/test_tensorrt_profiles.py``).
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import BuildError

from .profile import BuildProfile


class Range(NamedTuple):
    """Least, most frequent (what TensorRT picks its kernels for) and largest size of a dimension."""

    least: int
    usual: int
    most: int


Ranges = dict[str, Range]
"""By the dimension's name in :mod:`qwen2vl_trt.export.graphs`."""

_USUAL_PATCHES = 1024  # of a 448 x 448 image
_USUAL_PROMPT = 1024  # tokens


def vision_ranges(profile: BuildProfile, config: VisionConfig) -> Ranges:
    """For any mix of up to ``max_batch_size`` images whose patch counts are within the limits, strips included.

    Raises:
        BuildError: no image can have a patch count within the limits.
    """
    unit, side, slots = config.merge_unit, config.window_groups, config.window_slots
    fewest, most = -(-profile.min_hw_dims // unit), profile.max_hw_dims // unit  # merge groups of one image
    if most < fewest:
        raise BuildError(
            f"no image has {profile.min_hw_dims} to {profile.max_hw_dims} patches (--min-hw-dims, --max-hw-dims): a"
            f" patch count is a multiple of {unit}"
        )
    images = profile.max_batch_size
    usual = min(max(_USUAL_PATCHES // unit, fewest), most)
    usual_windows = images * _square_windows(usual, side)
    windows = Range(-(-fewest // side**2), usual_windows, images * most_windows(most, side))
    return {
        "windows": windows._replace(usual=min(max(usual_windows, windows.least), windows.most)),
        "slots": Range(slots, slots, slots),
        "sequences": Range(1, images, images),
        "longest": Range(fewest * unit, usual * unit, most * unit),
        "tokens": Range(fewest, images * usual, images * most),
    }


def most_windows(groups: int, side: int) -> int:
    """Windows of the worst image of at most so many merge groups: a strip one group high wastes most of each."""
    return max(-(-rows // side) * -(-(groups // rows) // side) for rows in range(1, groups + 1))


def _square_windows(groups: int, side: int) -> int:
    across = -(-max(isqrt(groups), 1) // side)
    return across * across


def decoder_ranges(profile: BuildProfile) -> tuple[Ranges, Ranges]:
    """Of the context profile (prompts, or chunks of them) and of the generation profile (one token a request).

    Prompts of like length run together, in neighbouring slots; most often there is one.
    """
    batch, usual = profile.max_num_seqs, min(_USUAL_PROMPT, profile.max_input_len)
    return (
        {"batch": Range(1, 1, batch), "sequence": Range(1, usual, profile.max_input_len)},
        {"batch": Range(1, batch, batch), "sequence": Range(1, 1, 1)},
    )
