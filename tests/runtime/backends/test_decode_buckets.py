"""Which slots a graph runs, and what becomes of those beside the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_trt.runtime.backends.common import graph_length, graph_lengths, graph_rows, graph_size, graph_sizes


def test_graphs_are_few_and_fit_every_number_of_rows():
    assert [graph_size(rows, 6) for rows in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert len({graph_size(rows, 128) for rows in range(1, 129)}) == 8


def test_all_of_them():
    """Nothing that a step needs is left out, and nothing else is in."""
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_lengths(700, 700) == graph_lengths(513, 700) == [128, 256, 512, 700]
    assert graph_lengths(1, 4096) == [128]
    assert graph_lengths(257, 4096) == [128, 256, graph_length(257, 4096)]


def test_rows_of_the_step_and_beside_it():
    """Slots beside the step write where their next token goes, and attend to one."""
    cache_start, kv_lengths = graph_rows(1, [5, 7], [3, 6, 8, 0, 9], 4, 10)
    assert cache_start == [3, 5, 7, 0]
    assert kv_lengths == [1, 6, 8, 1]


def test_a_full_slot():
    assert graph_rows(1, [5], [10, 6, 10, 10], 2, 10) is None, "slot 0 takes part and is full"
    assert graph_rows(1, [9], [0, 10, 10, 10], 2, 10) == ([0, 9], [1, 10]), "its own last position may be written"


@given(st.data())
def test_nothing_that_a_slot_holds_is_overwritten(data):
    slots, capacity = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    held = data.draw(st.lists(st.integers(0, capacity), min_size=slots, max_size=slots))
    first = data.draw(st.integers(0, slots - 1))
    count = data.draw(st.integers(1, slots - first))
    starts = [min(tokens, capacity - 1) for tokens in held[first : first + count]]
    rows = graph_rows(first, starts, held, graph_size(first + count, slots), capacity)
    if rows is None:
        assert capacity in held[:first] + held[first + count :]
        return
    cache_start, kv_lengths = rows
    assert all(length <= capacity for length in kv_lengths)
    for row, start in enumerate(cache_start):
        inside = first <= row < first + count
        assert start < capacity
        assert start == (starts[row - first] if inside else held[row])


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_graph_reaches_every_row(rows):
    assert rows <= graph_size(rows, 6) <= 6
