"""Two Triton kernels from 8-bit frames of any number and sizes to patches.

:mod:`~qwen2vl_trt.runtime.preprocessing.triton_writer` launches them. A frame is a row of int64 ``records``, whose
fields are named below; ``tables`` holds each axis's
:class:`~qwen2vl_trt.runtime.preprocessing.bicubic.BicubicTable` (first, then weights), ``levels`` the normalised value
of each level of each channel. A program finds its frame by counting the frames that start at or before it.

Imported only where Triton is installed; under ``TRITON_INTERPRET=1`` tests run it on the CPU.
"""

# ruff: noqa: N803, N806 - in Triton, compile-time constants are written in capitals
# Kernel arguments have no Python types.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

FIELDS = tl.constexpr(24)  # of a record

# The decoded frame: address and strides of channel, row, column; its height and width.
SOURCE = tl.constexpr(0)
HEIGHT = tl.constexpr(4)
WIDTH = tl.constexpr(5)
# What the vertical pass reads, likewise: the result of the horizontal pass, or the source if its width stays.
MIDDLE = tl.constexpr(6)
# Its sides after resizing.
ROWS = tl.constexpr(10)
COLUMNS = tl.constexpr(11)
# Of each axis: where its table starts, taps, half, precision.
ACROSS = tl.constexpr(12)
DOWN = tl.constexpr(16)
# Its first window in the output; the temporal position it fills, -1 for all; where its levels start.
FIRST_WINDOW = tl.constexpr(20)
TIME = tl.constexpr(21)
LEVELS = tl.constexpr(22)


@triton.jit
def _frame_of(starts, program, count, FRAMES: tl.constexpr):
    lanes = tl.arange(0, FRAMES)
    first = tl.load(starts + lanes, mask=lanes < count, other=2147483647)
    return tl.sum((first <= program).to(tl.int32), axis=0) - 1


@triton.jit(do_not_specialize=["count"])
def resize_rows(
    records, starts, tables, count, FRAMES: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """A tile of the horizontal pass, all channels, from a source with any strides to planes of 8 bits."""
    program = tl.program_id(0)
    frame = _frame_of(starts, program, count, FRAMES)
    record = records + frame * FIELDS
    columns = tl.load(record + COLUMNS).to(tl.int32)
    tile = program - tl.load(starts + frame)
    tiles = tl.cdiv(columns, TILE_COLUMNS)
    y = tile // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    x = tile % tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = x < columns
    rows = (y < tl.load(record + HEIGHT))[:, None]
    width = tl.load(record + WIDTH)

    table = tables + tl.load(record + ACROSS)
    taps = tl.load(record + ACROSS + 1).to(tl.int32)
    half = tl.load(record + ACROSS + 2).to(tl.int32)
    precision = tl.load(record + ACROSS + 3).to(tl.int32)
    first = tl.load(table + x, mask=inside, other=0)

    channel = tl.load(record + SOURCE + 1)
    step = tl.load(record + SOURCE + 3)
    pixel = tl.load(record + SOURCE).to(tl.pointer_type(tl.uint8))
    pixel += y[:, None] * tl.load(record + SOURCE + 2) + (first * step)[None, :]
    red = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.int32) + half
    green = red
    blue = red
    for tap in range(taps):
        weight = tl.load(table + columns * (tap + 1) + x, mask=inside, other=0)[None, :]
        mask = rows & (inside & (first + tap < width))[None, :]
        red += tl.load(pixel, mask=mask, other=0).to(tl.int32) * weight
        green += tl.load(pixel + channel, mask=mask, other=0).to(tl.int32) * weight
        blue += tl.load(pixel + 2 * channel, mask=mask, other=0).to(tl.int32) * weight
        pixel += step

    middle = tl.load(record + MIDDLE).to(tl.pointer_type(tl.uint8))
    plane = tl.load(record + MIDDLE + 1)
    target = middle + y[:, None] * tl.load(record + MIDDLE + 2) + x[None, :]
    mask = rows & inside[None, :]
    tl.store(target, tl.minimum(tl.maximum(red >> precision, 0), 255).to(tl.uint8), mask=mask)
    tl.store(target + plane, tl.minimum(tl.maximum(green >> precision, 0), 255).to(tl.uint8), mask=mask)
    tl.store(target + 2 * plane, tl.minimum(tl.maximum(blue >> precision, 0), 255).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["count"])
def write_windows(
    records,
    starts,
    tables,
    levels,
    output,
    count,
    PATCH: tl.constexpr,
    TIMES: tl.constexpr,
    MERGE: tl.constexpr,
    SIDE: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK values of a window: vertical pass, normalisation, patches in window order; empty slots become zero.

    A window is SIDE x SIDE merge groups of MERGE x MERGE patches of 3 channels, TIMES times and PATCH x PATCH pixels.
    """
    AREA: tl.constexpr = PATCH * PATCH
    UNIT: tl.constexpr = MERGE * MERGE
    SLOTS: tl.constexpr = SIDE * SIDE * UNIT
    VALUES: tl.constexpr = SLOTS * 3 * AREA  # of a window, temporal repetition left out
    BLOCKS: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    window = program // BLOCKS
    frame = _frame_of(starts, window, count, FRAMES)
    record = records + frame * FIELDS
    window -= tl.load(starts + frame)
    rows = tl.load(record + ROWS).to(tl.int32)
    columns = tl.load(record + COLUMNS).to(tl.int32)

    # Of the window, in merge groups: where it lies and what of it the frame fills.
    across = tl.cdiv(columns, SIDE * MERGE * PATCH)
    top = window // across * SIDE
    left = window % across * SIDE
    high = tl.minimum(rows // (MERGE * PATCH) - top, SIDE)
    wide = tl.minimum(columns // (MERGE * PATCH) - left, SIDE)

    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    slot = value // (3 * AREA)
    channel = value // AREA % 3
    pixel = value % AREA
    group = slot // UNIT
    patch = slot % UNIT
    filled = group < high * wide
    y = ((top + group // wide) * MERGE + patch // MERGE) * PATCH + pixel // PATCH
    x = ((left + group % wide) * MERGE + patch % MERGE) * PATCH + pixel % PATCH

    table = tables + tl.load(record + DOWN)
    taps = tl.load(record + DOWN + 1).to(tl.int32)
    total = tl.zeros([BLOCK], tl.int32) + tl.load(record + DOWN + 2).to(tl.int32)
    precision = tl.load(record + DOWN + 3).to(tl.int32)
    height = tl.load(record + HEIGHT)
    first = tl.load(table + y, mask=filled, other=0)
    line = tl.load(record + MIDDLE + 2)
    source = tl.load(record + MIDDLE).to(tl.pointer_type(tl.uint8))
    source += channel * tl.load(record + MIDDLE + 1) + first * line + x * tl.load(record + MIDDLE + 3)
    for tap in range(taps):
        weight = tl.load(table + rows * (tap + 1) + y, mask=filled, other=0)
        total += tl.load(source, mask=filled & (first + tap < height), other=0).to(tl.int32) * weight
        source += line
    level = tl.minimum(tl.maximum(total >> precision, 0), 255)

    normalised = tl.load(levels + tl.load(record + LEVELS) + channel * 256 + level, mask=filled, other=0)
    time = tl.load(record + TIME)
    start = (tl.load(record + FIRST_WINDOW) + window) * (VALUES * TIMES)  # of 64 bits, as the record
    target = output + start + (slot * 3 + channel) * (TIMES * AREA) + pixel
    for place in tl.static_range(TIMES):
        end = tl.where((time < 0) | (time == place), VALUES, 0)
        tl.store(target + place * AREA, normalised, mask=value < end)
