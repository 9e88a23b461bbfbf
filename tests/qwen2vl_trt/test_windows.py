"""The packed window layout: properties over random grids, and Transformers' own window order."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.windows import frame_windows, grids_of, window_layout


def vision_config(patch=14, merge=2, window=112):
    return VisionConfig(
        depth=1,
        hidden_size=16,
        num_heads=2,
        intermediate_size=24,
        out_hidden_size=16,
        fullatt_block_indexes=(0,),
        patch_size=patch,
        spatial_merge_size=merge,
        window_size=window,
    )


PUBLISHED = vision_config()
CONFIGS = [PUBLISHED, vision_config(window=56), vision_config(patch=7, merge=3, window=42), vision_config(merge=1)]


@st.composite
def batches(draw):
    config = draw(st.sampled_from(CONFIGS))
    merge = config.spatial_merge_size
    side = st.integers(1, 2 * config.window_groups + 2)
    grid = st.tuples(st.integers(1, 3), side, side).map(lambda g: (g[0], g[1] * merge, g[2] * merge))
    return config, tuple(draw(st.lists(grid, min_size=1, max_size=5)))


def filled(layout):
    """``[W, S]`` which slots hold a patch."""
    return torch.arange(layout.position_ids.shape[1]) < layout.window_lengths[:, None]


def raster_numbers(layout, grids):
    """``[W, S]`` which patch of the batch (frames in order, each in raster order) is in each slot; -1 if none."""
    start = torch.tensor([0, *[h * w for t, h, w in grids for _ in range(t)]]).cumsum(0)
    numbers = torch.full(layout.sequence_position.shape, -1)
    for sequence, length in enumerate(layout.sequence_lengths.tolist()):
        slots = layout.sequence_index[sequence, :length]
        assert (numbers.view(-1)[slots] == -1).all(), "a slot holds two patches"
        numbers.view(-1)[slots] = start[sequence] + torch.arange(length)
    return numbers


@settings(deadline=None, max_examples=80)
@given(batches())
def test_every_patch_lies_in_one_slot_and_slots_are_filled_from_the_front(batch):
    config, grids = batch
    layout = window_layout(grids, config)
    slots = config.window_slots
    numbers = raster_numbers(layout, grids)
    assert numbers.shape == (len(layout.window_lengths), slots)
    assert torch.equal(numbers >= 0, filled(layout))
    assert sorted(numbers[numbers >= 0].tolist()) == list(range(sum(t * h * w for t, h, w in grids)))
    assert int(layout.window_lengths.min()) >= 1
    assert int(layout.window_lengths.max()) <= slots


@settings(deadline=None, max_examples=80)
@given(batches())
def test_sequences_are_the_frames(batch):
    config, grids = batch
    layout = window_layout(grids, config)
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    assert layout.sequence_lengths.tolist() == lengths
    assert layout.sequence_index.shape == (len(lengths), max(lengths))
    beyond = torch.arange(max(lengths)) >= layout.sequence_lengths[:, None]
    assert (layout.sequence_index[beyond] == 0).all()

    # The two permutations undo each other: gathered to sequences and back, every patch returns to its slot.
    there = layout.sequence_index.reshape(-1)[layout.sequence_position]
    here = torch.arange(there.numel()).view_as(there)
    assert torch.equal(there[filled(layout)], here[filled(layout)])
    assert (layout.sequence_position[~filled(layout)] == 0).all()


@settings(deadline=None, max_examples=80)
@given(batches())
def test_positions_are_the_row_and_the_column(batch):
    config, grids = batch
    layout = window_layout(grids, config)
    numbers = raster_numbers(layout, grids)
    expected = torch.cat(
        [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for t, h, w in grids for _ in range(t)]
    )
    assert torch.equal(layout.position_ids[filled(layout)], expected[numbers[filled(layout)]])
    assert (layout.position_ids[~filled(layout)] == 0).all()


@settings(deadline=None, max_examples=80)
@given(batches())
def test_merge_index_brings_tokens_back_in_raster_order(batch):
    config, grids = batch
    merge = config.spatial_merge_size
    layout = window_layout(grids, config)
    groups = raster_numbers(layout, grids).view(-1, config.merge_unit)[layout.merge_index]  # [T, unit]
    expected, start = [], 0
    for frames, rows, columns in grids:
        for _ in range(frames):
            frame = start + torch.arange(rows * columns).view(rows, columns)
            for top in range(0, rows, merge):
                for left in range(0, columns, merge):
                    expected.append(frame[top : top + merge, left : left + merge].reshape(-1))
            start += rows * columns
    assert torch.equal(groups, torch.stack(expected))
    assert layout.tokens_per_item == tuple(t * h * w // config.merge_unit for t, h, w in grids)
    assert sum(layout.tokens_per_item) == len(layout.merge_index)


@settings(deadline=None, max_examples=80)
@given(batches())
def test_order_and_lengths_are_those_of_transformers(batch):
    config, grids = batch
    layout = window_layout(grids, config)
    index, bounds = get_vision_window_index(
        torch.tensor(grids), config.spatial_merge_size, config.window_size, config.patch_size
    )
    assert torch.equal(layout.window_lengths, bounds.diff().long())
    groups_in_slots = config.window_slots // config.merge_unit
    place = torch.full((len(layout.window_lengths) * groups_in_slots,), -1)
    place[layout.merge_index] = torch.arange(len(layout.merge_index))  # which token each group of slots makes
    assert torch.equal(place[place >= 0], index)

    positions = get_vision_position_ids(torch.tensor(grids), config.spatial_merge_size)  # in Transformers' patch order
    by_group = positions.view(len(index), config.merge_unit, 2)[index].view(-1, 2)
    assert torch.equal(layout.position_ids[filled(layout)], by_group)


@settings(deadline=None, max_examples=40)
@given(batches())
def test_a_batch_is_its_items_one_after_another(batch):
    config, grids = batch
    layout = window_layout(grids, config)
    alone = [window_layout((grid,), config) for grid in grids]
    for name in ("window_lengths", "position_ids", "sequence_lengths"):
        assert torch.equal(getattr(layout, name), torch.cat([getattr(one, name) for one in alone]))
    first = 0
    for one, merge_index in zip(alone, layout.merge_index.split(layout.tokens_per_item)):
        assert torch.equal(merge_index, one.merge_index + first * (config.window_slots // config.merge_unit))
        first += len(one.window_lengths)


def test_a_frame_one_group_past_a_window():
    frame = frame_windows(8, 10, PUBLISHED, slots=64)  # 4 x 5 merge groups: one full window, one column of four groups
    assert frame.lengths.tolist() == [64, 16]
    in_order = frame.patch_slots.argsort().tolist()  # raster index of each patch, by slot
    assert in_order[:6] == [0, 1, 10, 11, 2, 3]
    assert in_order[64:] == [8, 9, 18, 19, 28, 29, 38, 39, 48, 49, 58, 59, 68, 69, 78, 79]
    assert frame.group_slots.tolist() == [0, 1, 2, 3, 16, 4, 5, 6, 7, 17, 8, 9, 10, 11, 18, 12, 13, 14, 15, 19]


def test_more_slots_than_a_window_needs():
    wide = window_layout(((1, 4, 6), (2, 10, 2)), PUBLISHED, slots=96)
    usual = window_layout(((1, 4, 6), (2, 10, 2)), PUBLISHED)
    assert wide.position_ids.shape[1] == 96
    assert torch.equal(wide.position_ids[:, :64], usual.position_ids)
    assert torch.equal(wide.sequence_index // 96, usual.sequence_index // 64)
    assert torch.equal(wide.merge_index // 24, usual.merge_index // 16)


def test_index_tensors_are_int64_on_the_cpu():
    layout = window_layout(((1, 4, 6),), PUBLISHED)
    for field in fields(layout):
        value = getattr(layout, field.name)
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.device.type) == (torch.int64, "cpu")


def test_layouts_are_cached_by_their_grids():
    grids = grids_of(torch.tensor([[1, 4, 6], [2, 8, 8]]))
    assert grids == grids_of([[1, 4, 6], (2, 8, 8)]) == ((1, 4, 6), (2, 8, 8))
    assert window_layout(grids, PUBLISHED) is window_layout(grids_of([[1, 4, 6], [2, 8, 8]]), vision_config())
    assert window_layout(grids, PUBLISHED) is not window_layout(grids, vision_config(window=56))


@pytest.mark.parametrize(
    ("grid", "lengths"),
    [
        ((1, 2, 2), [4]),
        ((1, 8, 8), [64]),
        ((1, 10, 10), [64, 16, 16, 4]),
        ((2, 2, 18), [16, 16, 4] * 2),
        ((1, 2, 398), [16] * 49 + [12]),
        ((1, 398, 2), [16] * 49 + [12]),
    ],
)
def test_lengths_of_known_grids(grid, lengths):
    assert window_layout((grid,), PUBLISHED).window_lengths.tolist() == lengths
