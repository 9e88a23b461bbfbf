"""ONNX Runtime on both graphs against Transformers and against the torch backend, through the runtime's own runners."""

import numpy as np
import onnxruntime
import pytest
import torch

from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.runtime.backends.runners import open_engines
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
    """Embeddings ``[1, S, C]`` and positions ``[3, 1, S]`` with an image in the middle."""
    width = model.config.text_config.hidden_size
    embeds = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    tokens = [3] * 4 + [IMAGE] * 6 + [5] * (length - 10)
    return embeds, prompt_positions(tokens, model.config, [(1, 4, 6)])[0]


@torch.no_grad()
def expected_of(model, embeds, positions):
    states = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
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
            step = decoder.step(2, embeds[:, start:end], positions[..., start:end], [start], hidden=True)
            assert relative_error(step.hidden_states, states[:, start:end]) < 1e-5
            assert relative_error(step.logits, logits[:, end - 1]) < 1e-4
        start = end


def test_slots_at_different_lengths_decode_together(built_model, decoders):
    model, lengths, steps = built_model.reference, [30, 11, 24], 4
    prompts = [prompt(model, length + steps, seed=length) for length in lengths]
    expected = [expected_of(model, *one) for one in prompts]
    for decoder in decoders:
        for slot, ((embeds, positions), length) in enumerate(zip(prompts, lengths), start=1):
            step = decoder.step(slot, embeds[:, :length], positions[..., :length], [0])
            assert step.hidden_states is None
            assert relative_error(step.logits, expected[slot - 1][1][:, length - 1]) < 1e-4
        for i in range(steps):
            at = [length + i for length in lengths]
            embeds = torch.cat([embeds[:, k : k + 1] for (embeds, _), k in zip(prompts, at)])
            positions = torch.cat([positions[..., k : k + 1] for (_, positions), k in zip(prompts, at)], dim=1)
            step = decoder.step(1, embeds, positions, at, hidden=True)
            states = torch.cat([states[:, k : k + 1] for (states, _), k in zip(expected, at)])
            logits = torch.cat([logits[:, k] for (_, logits), k in zip(expected, at)])
            assert relative_error(step.hidden_states, states) < 1e-5
            assert relative_error(step.logits, logits) < 1e-4


def test_the_cache_keeps_what_it_holds_as_it_grows(built_model, decoders):
    embeds, positions = prompt(built_model.reference, 150, seed=2)
    states, logits = expected_of(built_model.reference, embeds, positions)
    for decoder in decoders:
        decoder.reset()
        capacity = decoder.cache.capacity
        decoder.step(0, embeds[:, :100], positions[..., :100], [0])
        step = decoder.step(0, embeds[:, 100:], positions[..., 100:], [100], hidden=True)
        assert decoder.cache.capacity > capacity
        assert relative_error(step.hidden_states, states[:, 100:]) < 1e-5
        assert relative_error(step.logits, logits[:, -1]) < 1e-4
        decoder.reset()


def test_rows_padded_on_the_right(built_model):
    """The graph's own rule, which no runner needs yet: ``last_token`` says where a padded row ends."""
    model, lengths = built_model.reference, [12, 31]
    text = our_config(model.config).text
    prompts = [prompt(model, length, seed=length) for length in lengths]
    longest, capacity = max(lengths), 64
    embeds = np.full((2, longest, text.hidden_size), 7.0, dtype=np.float32)
    positions = np.zeros((3, 2, longest), dtype=np.int64)
    for row, ((one, where), length) in enumerate(zip(prompts, lengths)):
        embeds[row, :length], positions[:, row, :length] = one[0], where[:, 0]
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
        assert relative_error(torch.from_numpy(states[row, :length]), expected[0]) < 1e-5
        assert relative_error(torch.from_numpy(logits[row]), expected_logits[0, -1]) < 1e-4


def test_caches_are_written_in_place(built_model, decoders, capfd):
    """Bound as input and output, TensorScatter writes into the one buffer; unbound it copies, and warns."""
    decoder, _ = decoders
    embeds, positions = prompt(built_model.reference, 20, seed=3)
    decoder.reset()
    for cache in (*decoder.cache.k, *decoder.cache.v):
        cache.fill_(3.0)
    capfd.readouterr()
    decoder.step(1, embeds, positions, [5])
    for cache in (*decoder.cache.k, *decoder.cache.v):
        touched = (cache != 3).all(dim=-1).all(dim=1)  # [slots, positions]
        assert touched[1].nonzero().flatten().tolist() == list(range(5, 25))
        assert not touched[[0, 2, 3]].any()
    assert COPIES not in capfd.readouterr().err

    session = decoder._session
    empty = np.zeros((1, *decoder.cache.k[0].shape[1:]), dtype=np.float32)
    inputs = {
        "inputs_embeds": embeds.numpy(),
        "position_ids": positions.numpy(),
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
    for decoder in decoders:
        step, answer, next_position = decoder.step(0, embeds, positions, [0]), [], int(positions.max()) + 1
        for i in range(30):
            answer.append(int(step.logits[0].argmax()))
            step = decoder.step(0, decoder.embed(answer[-1:])[None], torch.full((3, 1, 1), next_position + i), [20 + i])
        answers.append(answer)
    assert answers[0] == answers[1]
    with torch.no_grad():
        written = torch.cat([embeds, model.model.language_model.embed_tokens(torch.tensor([answers[0]]))], dim=1)
        where = torch.cat([positions, (next_position + torch.arange(30)).expand(3, 1, -1)], dim=2)
        _, logits = expected_of(model, written, where)
    assert logits[0, 19:-1].argmax(-1).tolist() == answers[0]
