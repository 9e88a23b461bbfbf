"""The key-value cache, the padded shapes of CUDA graphs, and the cache of index tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import EngineError, LimitError
from qwen2vl_trt.runtime.backends.common import (
    KVCache,
    cached_layouts,
    graph_batches,
    graph_inputs,
    graph_step,
    padded_batch,
    padded_step,
)
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.windows import WindowLayout, window_layout
from tests.support.models import model_config

CONFIG = Qwen2VLConfig.from_dict(model_config().to_dict()).text


def cache(slots=3, max_seq_len=1000):
    return KVCache(CONFIG, slots, max_seq_len, torch.float32, "cpu")


def test_a_cache_begins_empty_and_no_larger_than_allowed():
    found = cache()
    assert len(found.k) == len(found.v) == CONFIG.num_hidden_layers
    assert found.k[0].shape == (3, CONFIG.num_key_value_heads, 128, CONFIG.head_dim)
    assert not any(tensor.any() for tensor in (*found.k, *found.v))
    assert cache(max_seq_len=50).capacity == 50


def test_it_grows_by_powers_of_two_up_to_the_limit():
    found = cache()
    sizes = []
    for length in (1, 128, 129, 256, 257, 400, 513, 1000):
        found.reserve(length)
        assert found.capacity >= length
        sizes.append(found.capacity)
    assert sizes == [128, 128, 256, 256, 512, 512, 1000, 1000]
    with pytest.raises(LimitError, match=r"1,001 tokens do not fit the cache of 1,000 \(--max-seq-len\)"):
        found.reserve(1001)


def test_growth_keeps_what_is_written():
    found = cache()
    for number, tensor in enumerate((*found.k, *found.v)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    before = [tensor.clone() for tensor in (*found.k, *found.v)]
    found.reserve(300)
    for old, new in zip(before, (*found.k, *found.v)):
        assert torch.equal(new[:, :, :128], old)
        assert not new[:, :, 128:].any()


def test_reset_shrinks_and_a_small_cache_stays():
    found = cache()
    small = found.k[0]
    found.reset()
    assert found.k[0] is small
    found.reserve(600)
    found.reset()
    assert found.capacity == 128


def test_a_fixed_capacity():
    found = KVCache(CONFIG, 2, 300, torch.float32, "cpu", fixed=True)
    tensors = (*found.k, *found.v)
    found.reserve(300)
    found.reset()
    assert found.capacity == 300
    assert all(before is after for before, after in zip(tensors, (*found.k, *found.v)))


def test_rows_are_contiguous_views():
    found = cache()
    k, v = found.rows(1, 2)
    assert len(k) == len(v) == CONFIG.num_hidden_layers
    assert all(tensor.is_contiguous() for tensor in (*k, *v))
    v[0].fill_(7)
    assert (found.v[0][1:] == 7).all()
    assert not found.v[0][0].any()


def filled(found):
    for number, tensor in enumerate((*found.k, *found.v)):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return [tensor.clone() for tensor in (*found.k, *found.v)]


def test_a_prefix_is_copied_and_nothing_else():
    found = cache()
    before = filled(found)
    found.copy_prefix(2, 0, 50)
    for old, new in zip(before, (*found.k, *found.v)):
        assert torch.equal(new[0, :, :50], old[2, :, :50])
        assert torch.equal(new[0, :, 50:], old[0, :, 50:])
        assert torch.equal(new[1:], old[1:])


def test_rows_change_places_and_nothing_else():
    found = cache()
    before = filled(found)
    found.swap(2, 0, 50)
    for old, new in zip(before, (*found.k, *found.v)):
        assert torch.equal(new[[0, 2], :, :50], old[[2, 0], :, :50])
        assert torch.equal(new[:, :, 50:], old[:, :, 50:])
        assert torch.equal(new[1], old[1])


def test_chunks_are_rows_padded_to_the_longest():
    """The graph's inputs; ``graph_step`` takes the padding out again."""
    chunks = [Chunk(3, 10, 2), Chunk(4, 0, 3), Chunk(5, 7, 1)]
    embeds, positions = torch.arange(1.0, 13).view(6, 2), torch.arange(18).view(3, 6)
    inputs = graph_inputs(chunks, embeds, positions)
    assert inputs["inputs_embeds"].tolist() == [
        [[1, 2], [3, 4], [0, 0]],
        [[5, 6], [7, 8], [9, 10]],
        [[11, 12], [0, 0], [0, 0]],
    ]
    assert inputs["position_ids"][1].tolist() == [[6, 7, 0], [8, 9, 10], [11, 0, 0]]
    assert inputs["cache_start"].tolist() == [10, 0, 7]
    assert inputs["kv_lengths"].tolist() == [13, 3, 10]
    assert inputs["last_token"].tolist() == [1, 2, 0]
    logits = torch.tensor([[1.0], [2.0], [3.0]])
    for wanted, rows in ((None, [[1], [2], [3]]), ([], []), ([1], [[2]]), ([0, 2], [[1], [3]]), ([0, 1, 2], logits)):
        step = graph_step(chunks, wanted, logits, inputs["inputs_embeds"])
        assert torch.equal(step.logits, torch.as_tensor(rows, dtype=torch.float32).view(-1, 1))
        assert torch.equal(step.hidden_states, embeds)
    assert graph_step(chunks, None, logits, None).hidden_states is None


def test_chunks_of_one_length_are_not_copied():
    embeds, positions = torch.arange(12.0).view(6, 2), torch.arange(18).view(3, 6)
    inputs = graph_inputs([Chunk(0, 4, 3), Chunk(1, 0, 3)], embeds, positions)
    assert inputs["inputs_embeds"].data_ptr() == embeds.data_ptr()
    assert torch.equal(inputs["position_ids"], positions.view(3, 2, 3))
    assert inputs["last_token"].tolist() == [2, 2]


def test_trimming_keeps_what_is_asked_for():
    found = cache()
    found.reserve(700)
    before = filled(found)
    sizes = []
    for length in (600, 512, 257, 256, 129, 300, 100, 0):
        found.trim(length)
        sizes.append(found.capacity)
        for old, new in zip(before, (*found.k, *found.v)):
            assert torch.equal(new, old[:, :, : found.capacity])
    assert sizes == [1000, 512, 512, 256, 256, 256, 128, 128]


def test_growth_out_of_memory_leaves_everything_as_it_was(monkeypatch):
    found = cache()
    before = filled(found)

    def exhausted(*arguments, **keywords):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "zeros", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        found.reserve(300)
    assert found.capacity == 128
    assert all(torch.equal(old, new) for old, new in zip(before, (*found.k, *found.v)))


def test_bytes_are_those_of_keys_and_values():
    found = cache()
    expected = 2 * CONFIG.num_hidden_layers * 3 * CONFIG.num_key_value_heads * 128 * CONFIG.head_dim * 4
    assert found.nbytes == expected


def test_graphs_are_few_and_fit_every_number_of_rows():
    assert [padded_batch(rows, 6) for rows in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert len({padded_batch(rows, 128) for rows in range(1, 129)}) == 8


def test_all_of_them():
    """Nothing that a step needs is left out, and nothing else is in."""
    assert graph_batches(6) == [1, 2, 4, 6]
    assert graph_batches(1) == [1]
    assert graph_batches(257) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 257]


def test_rows_of_the_step_and_beside_it():
    """Slots beside the step write where their next token goes, and attend to one."""
    cache_start, kv_lengths = padded_step(1, [5, 7], [3, 6, 8, 0, 9], 4, 10)
    assert cache_start == [3, 5, 7, 0]
    assert kv_lengths == [1, 6, 8, 1]


def test_a_full_slot():
    assert padded_step(1, [5], [10, 6, 10, 10], 2, 10) is None, "slot 0 takes part and is full"
    assert padded_step(1, [9], [0, 10, 10, 10], 2, 10) == ([0, 9], [1, 10]), "its own last position may be written"


@given(st.data())
def test_nothing_that_a_slot_holds_is_overwritten(data):
    slots, capacity = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    slot_lengths = data.draw(st.lists(st.integers(0, capacity), min_size=slots, max_size=slots))
    first = data.draw(st.integers(0, slots - 1))
    count = data.draw(st.integers(1, slots - first))
    starts = [min(tokens, capacity - 1) for tokens in slot_lengths[first : first + count]]
    rows = padded_step(first, starts, slot_lengths, padded_batch(first + count, slots), capacity)
    if rows is None:
        assert capacity in slot_lengths[:first] + slot_lengths[first + count :]
        return
    cache_start, kv_lengths = rows
    assert all(length <= capacity for length in kv_lengths)
    for row, start in enumerate(cache_start):
        inside = first <= row < first + count
        assert start < capacity
        assert start == (starts[row - first] if inside else slot_lengths[row])


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_graph_reaches_every_row(rows):
    assert rows <= padded_batch(rows, 6) <= 6


def test_those_used_last_are_kept(checkpoint):
    config, made = Checkpoint(checkpoint).config.vision, []
    place = cached_layouts(lambda layout: made.append(layout) or len(made))
    layouts = [window_layout(((1, 2, 2 * n),), config) for n in range(1, 66)]
    assert [place(layout) for layout in layouts[:64]] == list(range(1, 65))
    assert place(layouts[0]) == 1
    assert place(layouts[64]) == 65
    assert [place(layouts[0]), place(layouts[1])] == [1, 66], "the second was used longest ago"


def test_onnxruntime_asks_a_layout_for_its_tensors_once(engine_dirs, monkeypatch):
    engines, asked = open_engines(engine_dirs["onnxruntime"], "cpu"), []
    tensors = WindowLayout.index_tensors.fget
    monkeypatch.setattr(WindowLayout, "index_tensors", property(lambda self: asked.append(1) or tensors(self)))
    config = engines.checkpoint.config.vision
    layout = window_layout(((1, 4, 6),), config)
    pixels = torch.ones(*layout.sequence_position.shape, config.qwen2_vl_dim)
    first, second = engines.vision(pixels, layout), engines.vision(pixels, layout)
    assert len(asked) == 1
    assert torch.equal(first, second)


def test_a_cache_that_cannot_be_had_names_the_limit(monkeypatch):
    def exhausted(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", exhausted)
    with pytest.raises(EngineError, match=r"of 1,000,000 requests of 128 tokens takes .* a smaller --max-num-seqs"):
        cache(slots=1_000_000)


def test_lengths_move_with_their_slots():
    """What fills a captured batch up is written behind them."""
    found = cache()
    found.lengths = [11, 33, 0]
    found.copy_prefix(1, 2, 20)
    assert found.lengths == [11, 33, 20]
    found.swap(0, 2, 20)
    assert found.lengths == [20, 33, 11]
