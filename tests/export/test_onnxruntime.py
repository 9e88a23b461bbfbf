"""ONNX Runtime on both graphs against Transformers and against the torch backend, through the runtime's own runners."""

import numpy as np
import onnxruntime
import pytest
import torch

from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.errors import LimitError
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.windows import window_layout
from tests.support.models import IMAGE, our_config, pack_windows, prompt_positions, random_patches, relative_error

COPIES = "in-place optimization not activated"  # what ONNX Runtime warns of where TensorScatter copies its cache
BATCHES = [
    [(1, 2, 2)],
    [(1, 10, 12)],
    [(1, 2, 398)],
    [(1, 2, 2), (1, 8, 8), (1, 10, 10), (3, 4, 6), (1, 26, 4), (1, 16, 16), (1, 6, 14), (2, 12, 22)],
]


@pytest.fixture(scope="module")
def runners(built_model, tmp_path_factory):
    """Engines of ONNX Runtime, then of torch."""
    folder = tmp_path_factory.mktemp("torch")
    profile = Manifest.read(built_model.engines).profile
    build_engines(ResolvedModel("random", built_model.checkpoint), *find_backend("torch", "fp32"), profile, folder)
    return open_engines(built_model.engines, "cpu"), open_engines(folder, "cpu")


@pytest.fixture(scope="module")
def decoders(runners):
    return [engines.decoder for engines in runners]


def prompt(model, length, seed):
    """Embeddings ``[S, C]`` and positions ``[3, S]`` with an image in the middle."""
    width = model.config.text_config.hidden_size
    embeds = torch.randn(length, width, generator=torch.Generator().manual_seed(seed))
    tokens = [3] * 4 + [IMAGE] * 6 + [5] * (length - 10)
    return embeds, prompt_positions(tokens, model.config, [(1, 4, 6)])[0][:, 0]


@torch.no_grad()
def expected_of(model, embeds, positions):
    """Hidden states ``[S, C]`` and logits ``[S, V]`` of every token."""
    inputs = {"inputs_embeds": embeds[None], "position_ids": positions[:, None]}
    states = model.model.language_model(**inputs, use_cache=False).last_hidden_state[0]
    return states, model.lm_head(states)


@pytest.mark.parametrize("grids", BATCHES, ids=["one group", "odd edges", "strip", "mixed"])
@torch.no_grad()
def test_the_vision_graph_equals_transformers_and_torch(built_model, runners, grids):
    model = built_model.reference
    patches = random_patches(grids, model.config)
    windows = pack_windows(patches, grids, model.config)
    layout = window_layout(tuple(grids), our_config(model.config).vision)
    found, by_torch = (engines.vision(windows, layout) for engines in runners)
    assert found.shape == (len(layout.merge_index), model.config.vision_config.out_hidden_size)
    assert relative_error(found, model.model.visual(patches, torch.tensor(grids)).pooler_output) < 1e-5
    assert relative_error(found, by_torch) < 1e-5


@pytest.mark.parametrize("chunks", [(40,), (16, 23, 1), (1,) * 40], ids=["whole", "chunks", "tokens"])
def test_prefill_in_chunks(built_model, decoders, chunks):
    embeds, positions = prompt(built_model.reference, 40, seed=1)
    states, logits = expected_of(built_model.reference, embeds, positions)
    start = 0
    for chunk in chunks:
        end = start + chunk
        for decoder in decoders:
            step = decoder.step([Chunk(2, start, chunk)], embeds[start:end], positions[:, start:end], hidden=True)
            assert relative_error(step.hidden_states, states[start:end]) < 1e-5
            assert relative_error(step.logits, logits[end - 1 : end]) < 1e-4
        start = end


def packed(prompts, chunks):
    """What a step takes of prompts, one a chunk."""
    embeds = torch.cat([embeds[chunk.start : chunk.end] for (embeds, _), chunk in zip(prompts, chunks)])
    positions = torch.cat([where[:, chunk.start : chunk.end] for (_, where), chunk in zip(prompts, chunks)], dim=1)
    return chunks, embeds, positions


def packed_expected(expected, chunks):
    """Hidden states of all tokens ``[T, C]``, and logits of each chunk's last one ``[B, V]``."""
    states = torch.cat([states[chunk.start : chunk.end] for (states, _), chunk in zip(expected, chunks)])
    return states, torch.stack([logits[chunk.end - 1] for (_, logits), chunk in zip(expected, chunks)])


def test_slots_at_different_lengths_decode_together(built_model, decoders):
    model, lengths, steps = built_model.reference, [30, 11, 24], 4
    prompts = [prompt(model, length + steps, seed=length) for length in lengths]
    expected = [expected_of(model, *one) for one in prompts]
    for decoder in decoders:
        for slot, (one, found, length) in enumerate(zip(prompts, expected, lengths), start=1):
            step = decoder.step(*packed([one], [Chunk(slot, 0, length)]))
            assert step.hidden_states is None
            assert relative_error(step.logits[0], found[1][length - 1]) < 1e-4
        for i in range(steps):
            chunks = [Chunk(slot, length + i, 1) for slot, length in enumerate(lengths, start=1)]
            step = decoder.step(*packed(prompts, chunks), hidden=True)
            states, logits = packed_expected(expected, chunks)
            assert relative_error(step.hidden_states, states) < 1e-5
            assert relative_error(step.logits, logits) < 1e-4


@pytest.mark.parametrize("wanted", [None, [], [1], [0, 2]], ids=str)
def test_chunks_of_different_lengths_in_one_call(built_model, decoders, wanted):
    """Begun, going on and of one token; hidden states are those of the tokens alone. Answers follow beside a filler."""
    model, lengths, steps = built_model.reference, [31, 12, 20], 3
    prompts = [prompt(model, length + steps, seed=length) for length in lengths]
    expected = [expected_of(model, *one) for one in prompts]
    for decoder in decoders:
        decoder.step(*packed(prompts[2:], [Chunk(3, 0, 19)]))
        chunks = [Chunk(1, 0, 31), Chunk(2, 0, 12), Chunk(3, 19, 1)]
        step = decoder.step(*packed(prompts, chunks), wanted, hidden=True)
        states, logits = packed_expected(expected, chunks)
        rows = list(range(3)) if wanted is None else wanted
        assert step.hidden_states.shape == states.shape
        assert relative_error(step.hidden_states, states) < 1e-5
        assert step.logits.shape == (len(rows), logits.shape[1])
        if rows:
            assert relative_error(step.logits, logits[rows]) < 1e-4
        for i in range(steps):
            chunks = [Chunk(slot, length + i, 1) for slot, length in enumerate(lengths, start=1)]
            if i == 1:  # slot 2 only lies between the others; it writes behind its tokens
                chunks[1] = Chunk(2, lengths[1] + 1, 1)
                _, embeds, positions = packed(prompts, chunks)
                embeds[1], positions[:, 1] = 0, 0
                step = decoder.step(chunks, embeds, positions, [0, 2])
                logits = packed_expected(expected, chunks)[1][[0, 2]]
            else:
                if i == 2:
                    chunks[1] = Chunk(2, lengths[1] + 1, 1)
                step = decoder.step(*packed(prompts, chunks))
                logits = packed_expected(expected, chunks)[1]
            assert relative_error(step.logits, logits) < 1e-4


def test_chunks_that_end_where_the_cache_ends(built_model, decoders):
    """Near ``max_seq_len`` rows of different lengths go together as long as padding fits."""
    most, model = decoders[0].cache.max_seq_len, built_model.reference
    prompts = [prompt(model, length, seed=length) for length in (most, most - 5)]
    expected = [expected_of(model, *one) for one in prompts]
    for decoder in decoders:
        decoder.reset()
        starts = [most - 40, most - 40]
        for slot, (one, start) in enumerate(zip(prompts, starts)):
            decoder.step(*packed([one], [Chunk(slot, 0, start)]))
        chunks = [Chunk(0, most - 40, 40), Chunk(1, most - 40, 35)]
        step = decoder.step(*packed(prompts, chunks), hidden=True)
        states, logits = packed_expected(expected, chunks)
        assert relative_error(step.hidden_states, states) < 1e-5
        assert relative_error(step.logits, logits) < 1e-4
        decoder.reset()


def test_padding_must_fit_the_cache_too(built_model, decoders):
    """A packed decoder has none."""
    most, model = decoders[0].cache.max_seq_len, built_model.reference
    step = packed([prompt(model, most, seed=1)] * 2, [Chunk(0, 0, 12), Chunk(1, most - 11, 11)])
    with pytest.raises(LimitError, match=f"{most + 1:,} tokens do not fit the cache of {most:,}"):
        decoders[0].step(*step)
    assert decoders[1].step(*step).logits.isfinite().all()
    for decoder in decoders:
        decoder.reset()


def test_the_cache_keeps_what_it_holds_as_it_grows(built_model, decoders):
    one = prompt(built_model.reference, 150, seed=2)
    states, logits = expected_of(built_model.reference, *one)
    for decoder in decoders:
        decoder.reset()
        capacity = decoder.cache.capacity
        decoder.step(*packed([one], [Chunk(0, 0, 100)]))
        step = decoder.step(*packed([one], [Chunk(0, 100, 50)]), hidden=True)
        assert decoder.cache.capacity > capacity
        assert relative_error(step.hidden_states, states[100:]) < 1e-5
        assert relative_error(step.logits, logits[-1:]) < 1e-4
        decoder.reset()


def test_rows_padded_on_the_right(built_model):
    """The graph's own rule: ``last_token`` says where a padded row ends."""
    model, lengths = built_model.reference, [12, 31]
    text = our_config(model.config).text
    prompts = [prompt(model, length, seed=length) for length in lengths]
    longest, capacity = max(lengths), 64
    embeds = np.full((2, longest, text.hidden_size), 7.0, dtype=np.float32)
    positions = np.zeros((3, 2, longest), dtype=np.int64)
    for row, ((one, where), length) in enumerate(zip(prompts, lengths)):
        embeds[row, :length], positions[:, row, :length] = one, where
    cache = np.full((2, text.num_key_value_heads, capacity, text.head_dim), 50.0, dtype=np.float32)
    session = onnxruntime.InferenceSession(built_model.engines / "decoder.onnx", providers=["CPUExecutionProvider"])
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "cache_start": np.array([0, 0]),
        "kv_lengths": np.array([longest, longest]),
        "last_token": np.array(lengths) - 1,
    }
    inputs |= {value.name: cache for value in session.get_inputs() if value.name not in inputs}
    logits, states = session.run(["logits", "hidden_states"], inputs)
    for row, ((one, where), length) in enumerate(zip(prompts, lengths)):
        expected, expected_logits = expected_of(model, one, where)
        assert relative_error(torch.from_numpy(states[row, :length]), expected) < 1e-5
        assert relative_error(torch.from_numpy(logits[row]), expected_logits[-1]) < 1e-4


def test_caches_are_written_in_place(built_model, decoders, capfd):
    """Bound as input and output, TensorScatter writes into the one buffer; unbound it copies, and warns."""
    decoder, _ = decoders
    embeds, positions = prompt(built_model.reference, 20, seed=3)
    decoder.reset()
    for cache in (*decoder.cache.k, *decoder.cache.v):
        cache.fill_(3.0)
    capfd.readouterr()
    decoder.step([Chunk(1, 5, 20)], embeds, positions)
    for cache in (*decoder.cache.k, *decoder.cache.v):
        touched = (cache != 3).all(dim=-1).all(dim=1)  # [slots, positions]
        assert touched[1].nonzero().flatten().tolist() == list(range(5, 25))
        assert not touched[[0, 2, 3]].any()
    assert COPIES not in capfd.readouterr().err

    session = decoder._session
    empty = np.zeros((1, *decoder.cache.k[0].shape[1:]), dtype=np.float32)
    inputs = {
        "inputs_embeds": embeds[None].numpy(),
        "position_ids": positions[:, None].numpy(),
        "cache_start": np.array([0]),
        "kv_lengths": np.array([20]),
        "last_token": np.array([19]),
    }
    inputs |= {value.name: empty for value in session.get_inputs() if value.name not in inputs}
    session.run(["logits"], inputs)
    assert COPIES in capfd.readouterr().err, "the warning has another text now: this test no longer sees it"


def test_embeddings_of_tokens(built_model, decoders):
    tokens = [0, 95, 7, 7]
    expected = built_model.reference.model.language_model.embed_tokens.weight[tokens]
    for decoder in decoders:
        assert torch.equal(decoder.embed(tokens), expected)


def test_greedy_tokens_of_both_backends(built_model, decoders):
    """30 tokens, each backend fed with its own; Transformers reads the whole answer at once and agrees."""
    model = built_model.reference
    embeds, positions = prompt(model, 20, seed=4)
    answers = []
    next_position = int(positions.max()) + 1
    for decoder in decoders:
        step, answer = decoder.step([Chunk(0, 0, 20)], embeds, positions), []
        for i in range(30):
            answer.append(int(step.logits[0].argmax()))
            position = torch.full((3, 1), next_position + i)
            step = decoder.step([Chunk(0, 20 + i, 1)], decoder.embed(answer[-1:]), position)
        answers.append(answer)
    assert answers[0] == answers[1]
    with torch.no_grad():
        written = torch.cat([embeds, model.model.language_model.embed_tokens(torch.tensor(answers[0]))])
        where = torch.cat([positions, (next_position + torch.arange(30)).expand(3, -1)], dim=1)
        _, logits = expected_of(model, written, where)
    assert logits[19:-1].argmax(-1).tolist() == answers[0]
