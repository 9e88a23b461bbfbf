"""Which slots and how many keys a captured decode step runs over: a handful of shapes instead of one for each request.

A CUDA graph is captured for fixed shapes and addresses. So a step of any neighbouring slots runs the first 1, 2, 4, ...
slots, as many as hold it: a handful of graphs, where one for each choice of neighbours would be a square of them. A
slot that only fills up the batch writes beyond its tokens, as :mod:`qwen2vl_trt.runtime.scheduling.scheduler` lets it,
and attends to one.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORTEST = 128


def graph_size(rows: int, slots: int) -> int:
    """How many slots a graph runs that has to reach the first ``rows``: a power of two, or all."""
    return min(1 << (rows - 1).bit_length(), slots)


def graph_length(longest: int, capacity: int) -> int:
    """How many keys of a slot a graph reads that has to reach ``longest``: a power of two, or all."""
    return min(max(_SHORTEST, 1 << (longest - 1).bit_length()), capacity)


def graph_sizes(slots: int) -> list[int]:
    """Every :func:`graph_size`, the smallest first."""
    return sorted({graph_size(rows, slots) for rows in range(1, slots + 1)})


def graph_lengths(longest: int, capacity: int) -> list[int]:
    """Every :func:`graph_length` of up to ``longest`` keys, the shortest first."""
    return sorted({graph_length(length, capacity) for length in range(1, longest + 1)})


def graph_rows(
    first: int, starts: Sequence[int], held: Sequence[int], size: int, capacity: int
) -> tuple[list[int], list[int]] | None:
    """``cache_start`` and ``kv_lengths`` of the first ``size`` slots.

    Args:
        first: the first slot of the step.
        starts: tokens that the step's slots hold.
        held: tokens that each slot holds.
        size: slots that the graph runs.
        capacity: positions of a slot.

    Returns:
        None where a slot that only fills up is full: it has no place to write to that does no harm.
    """
    last = first + len(starts)
    others = [*range(first), *range(last, size)]
    if any(held[row] >= capacity for row in others):
        return None
    cache_start, kv_lengths = list(held[:size]), [1] * size
    cache_start[first:last] = starts
    kv_lengths[first:last] = [start + 1 for start in starts]
    return cache_start, kv_lengths
