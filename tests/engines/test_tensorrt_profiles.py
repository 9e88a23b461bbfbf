"""Profiles: every batch within the limits fits every range, and no range is wider than some batch needs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.engines.tensorrt_profiles import decoder_ranges, most_windows, vision_ranges
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.windows import window_layout

VISION = VisionConfig(
    depth=1, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=16, fullatt_block_indexes=(0,)
)
UNIT = VISION.merge_unit


def sizes(grids):
    """The dimensions of the vision graph's inputs for a batch."""
    layout = window_layout(tuple(grids), VISION)
    windows, slots = layout.sequence_position.shape
    sequences, longest = layout.sequence_index.shape
    return {
        "windows": windows,
        "slots": slots,
        "sequences": sequences,
        "longest": longest,
        "tokens": len(layout.merge_index),
    }


@st.composite
def legal_batches(draw):
    """Limits, and images and videos within them; sides are even numbers of patches, strips are as likely as squares."""
    fewest = draw(st.integers(1, 60))
    most = draw(st.integers(fewest, fewest + 200))
    profile = BuildProfile(
        min_hw_dims=draw(st.integers(UNIT * (fewest - 1) + 1, UNIT * fewest)),
        max_hw_dims=draw(st.integers(UNIT * most, UNIT * most + UNIT - 1)),
        max_batch_size=draw(st.integers(1, 5)),
    )
    grids, frames_left = [], profile.max_batch_size
    while frames_left and (not grids or draw(st.booleans())):
        groups = draw(st.integers(fewest, most))
        divisors = [rows for rows in range(1, groups + 1) if groups % rows == 0]
        rows = draw(st.sampled_from(divisors))
        frames = draw(st.integers(1, frames_left))
        frames_left -= frames
        grids.append((frames, 2 * rows, 2 * groups // rows))
    return profile, grids


@settings(deadline=None, max_examples=400)
@given(legal_batches())
def test_every_legal_batch_fits(batch):
    profile, grids = batch
    ranges = vision_ranges(profile, VISION)
    found = sizes(grids)
    assert found.keys() == ranges.keys()
    for name, size in found.items():
        assert ranges[name].least <= size <= ranges[name].most, (name, size, ranges[name])


@given(st.integers(1, 400), st.integers(1, 6), st.integers(1, 9))
def test_ranges_are_in_order(fewest, more, images):
    limits = {"max_batch_size": images, "max_num_seqs": images}
    profile = BuildProfile(min_hw_dims=UNIT * fewest, max_hw_dims=UNIT * fewest * more, **limits)
    for ranges in (vision_ranges(profile, VISION), *decoder_ranges(profile)):
        assert all(1 <= least <= usual <= most for least, usual, most in ranges.values()), ranges


@pytest.mark.parametrize("most", [1, 5, 17, 45, 128, 324])
def test_the_upper_ends_are_reached(most):
    """By the worst strip, repeated: a wider range would cost memory for nothing."""
    profile = BuildProfile(min_hw_dims=UNIT, max_hw_dims=UNIT * most, max_batch_size=3)
    ranges = vision_ranges(profile, VISION)
    shapes = [(1, 2 * rows, 2 * (most // rows)) for rows in range(1, most + 1)]
    assert max(sizes([shape] * 3)["windows"] for shape in shapes) == ranges["windows"].most
    strip = sizes([(1, 2, 2 * most)] * 3)
    assert {name: strip[name] for name in ("sequences", "longest", "tokens")} == {
        name: ranges[name].most for name in ("sequences", "longest", "tokens")
    }


def test_default_limits_on_the_published_window():
    ranges = vision_ranges(BuildProfile(), VISION)
    assert ranges["slots"] == (64, 64, 64)
    assert ranges["windows"] == (1, 8 * 16, 8 * 676)  # strips of 1 x 2704 groups; eight images of 448 x 448
    assert ranges["longest"] == (16, 1024, 10816)
    assert ranges["tokens"] == (4, 8 * 256, 8 * 2704)
    assert most_windows(2704, 4) == 676


def test_limits_between_two_patch_counts_are_refused():
    with pytest.raises(
        BuildError, match=r"no image has 5 to 7 patches \(--min-hw-dims, --max-hw-dims\).*multiple of 4"
    ):
        vision_ranges(BuildProfile(min_hw_dims=5, max_hw_dims=7), VISION)


def test_the_decoder_takes_prompts_and_single_tokens():
    context, generation = decoder_ranges(BuildProfile(max_num_seqs=6, max_input_len=300, max_seq_len=400))
    assert context == {"batch": (1, 1, 6), "sequence": (1, 300, 300)}
    assert generation == {"batch": (1, 6, 6), "sequence": (1, 1, 1)}


def test_images_of_a_call_and_requests_under_way_are_limits_of_their_own():
    profile = BuildProfile(max_batch_size=2, max_num_seqs=5)
    assert vision_ranges(profile, VISION)["sequences"] == (1, 2, 2)
    assert [ranges["batch"] for ranges in decoder_ranges(profile)] == [(1, 1, 5), (1, 5, 5)]
