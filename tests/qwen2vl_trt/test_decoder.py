"""The decoder with its static cache against Transformers: prefill in chunks, decode, ragged batches, greedy tokens."""

from dataclasses import fields

import pytest
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import window_layout
from tests.support.models import (
    IMAGE,
    VIDEO,
    model_config,
    our_config,
    pack_windows,
    prompt_positions,
    random_model,
    random_patches,
    relative_error,
    save_model,
    token_type_ids,
    vision_tokens,
)

CAPACITY = 128
MODELS = {
    "heads 4 share 2, tied": {"tied": True},
    "heads 4 share 4": {"tied": False, "text": {"num_key_value_heads": 4}},
    "heads 4 share 1": {"tied": True, "text": {"num_key_value_heads": 1}},
    "heads 7 share 1, untied, as 7B": {
        "tied": False,
        "text": {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "intermediate_size": 592},
    },
    "one layer, two heads": {"tied": False, "text": {"num_attention_heads": 2, "num_hidden_layers": 1}},
}


class Session:
    """A decoder with a cache of some rows, fed step by step."""

    def __init__(self, decoder, rows):
        self.decoder = decoder
        text = decoder.config
        shape = (rows, text.num_key_value_heads, CAPACITY, text.head_dim)
        # What lies beyond a row's length must not matter, so it is large here; not NaN, which no mask undoes.
        self.k = [torch.full(shape, 50.0) for _ in range(text.num_hidden_layers)]
        self.v = [torch.full(shape, 50.0) for _ in range(text.num_hidden_layers)]

    @torch.no_grad()
    def step(self, embeds, positions, starts, last=None, first_row=0):
        """Feed ``[B, S, C]`` and ``[3, B, S]`` to the rows from ``first_row`` on."""
        rows = slice(first_row, first_row + len(embeds))
        length = embeds.shape[1]
        start = torch.tensor(starts)
        return self.decoder(
            embeds,
            positions,
            start,
            start + length,
            torch.tensor(last or [length - 1] * len(embeds)),
            [k[rows] for k in self.k],
            [v[rows] for v in self.v],
        )


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A model of Transformers and ours, from one checkpoint."""
    return both(tmp_path_factory.mktemp("decoder"), **MODELS[request.param])


def both(folder, **config):
    model = random_model(model_config(**config))
    checkpoint = Checkpoint(save_model(model, folder))
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config.text).eval()
    load_weights(decoder, checkpoint)
    return model, decoder


def random_prompt(length, model, seed):
    """Embeddings ``[1, S, C]`` and uneven positions ``[3, 1, S]``: an image in the middle."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, length, model.config.text_config.hidden_size, generator=generator)
    tokens = [3] * (length // 3) + [IMAGE] * 6 + [4] * (length - length // 3 - 6) if length > 9 else [3] * length
    positions, delta = prompt_positions(tokens, model.config, [(1, 4, 6)] if IMAGE in tokens else [])
    return embeds, positions, delta


@torch.no_grad()
def transformers_states(model, embeds, positions):
    """Hidden states ``[B, S, C]`` and the logits of every token ``[B, S, V]``."""
    states = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    return states, model.lm_head(states)


def check(output, states, logits):
    assert output.logits.dtype == torch.float32
    assert relative_error(output.hidden_states, states) < 1e-5
    assert relative_error(output.logits, logits) < 1e-5


def test_prefill_equals_transformers(pair):
    model, decoder = pair
    for length in (1, 2, 40):
        embeds, positions, _ = random_prompt(length, model, seed=length)
        states, logits = transformers_states(model, embeds, positions)
        check(Session(decoder, 1).step(embeds, positions, [0]), states, logits[:, -1])


def test_a_layer_of_3b_equals_transformers(tmp_path):
    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_hidden_layers": 1}
    test_prefill_equals_transformers(both(tmp_path, text=text))


@pytest.mark.parametrize(
    "chunks",
    [(17, 23), (1, 39), (39, 1), (7, 7, 7, 7, 7, 5), (1,) * 40],
    ids=lambda chunks: f"{len(chunks)} of {chunks[0]}",
)
def test_prefill_in_chunks(pair, chunks):
    model, decoder = pair
    embeds, positions, _ = random_prompt(40, model, seed=1)
    states, logits = transformers_states(model, embeds, positions)
    session, start = Session(decoder, 1), 0
    for chunk in chunks:
        end = start + chunk
        output = session.step(embeds[:, start:end], positions[..., start:end], [start])
        check(output, states[:, start:end], logits[:, end - 1])
        start = end


def test_rows_of_different_lengths_decode_together(pair):
    """Each row prefilled alone in its slot, in chunks; then all decode at once, each at its own length."""
    model, decoder = pair
    lengths, steps = [13, 40, 1, 25], 5
    prompts = [random_prompt(length + steps, model, seed=length) for length in lengths]
    expected = [transformers_states(model, embeds, positions) for embeds, positions, _ in prompts]
    session = Session(decoder, len(lengths))
    for row, ((embeds, positions, _), length) in enumerate(zip(prompts, lengths)):
        middle = length // 2
        if middle:
            session.step(embeds[:, :middle], positions[..., :middle], [0], first_row=row)
        output = session.step(embeds[:, middle:length], positions[..., middle:length], [middle], first_row=row)
        check(output, expected[row][0][:, middle:length], expected[row][1][:, length - 1])
    for step in range(steps):
        at = [length + step for length in lengths]
        embeds = torch.cat([prompt[:, i : i + 1] for (prompt, _, _), i in zip(prompts, at)])
        positions = torch.cat([where[..., i : i + 1] for (_, where, _), i in zip(prompts, at)], dim=1)
        output = session.step(embeds, positions, at)
        states = torch.cat([states[:, i : i + 1] for (states, _), i in zip(expected, at)])
        logits = torch.cat([logits[:, i] for (_, logits), i in zip(expected, at)])
        check(output, states, logits)


def test_rows_padded_on_the_right_prefill_and_decode_together(pair):
    """The rule of ``Decoder.forward``: what padding writes lies beyond the row and is overwritten by its next step."""
    model, decoder = pair
    lengths, steps = [11, 30, 24], 3
    prompts = [random_prompt(length + steps, model, seed=length) for length in lengths]
    expected = [transformers_states(model, embeds, positions) for embeds, positions, _ in prompts]
    longest = max(lengths)
    embeds = torch.full((len(lengths), longest, model.config.text_config.hidden_size), 7.0)
    positions = torch.zeros(3, len(lengths), longest, dtype=torch.int64)
    for row, ((prompt, where, _), length) in enumerate(zip(prompts, lengths)):
        embeds[row, :length], positions[:, row, :length] = prompt[0, :length], where[:, 0, :length]
    session = Session(decoder, len(lengths))
    output = session.step(embeds, positions, [0] * len(lengths), last=[length - 1 for length in lengths])
    for row, length in enumerate(lengths):
        states, logits = expected[row]
        assert relative_error(output.hidden_states[row, :length], states[0, :length]) < 1e-5
        assert relative_error(output.logits[row], logits[0, length - 1]) < 1e-5

    # Two more tokens for the first and the last row, three for the second.
    new = [2, 3, 2]
    embeds, positions = torch.full_like(embeds[:, :3], 7.0), torch.zeros_like(positions[..., :3])
    for row, ((prompt, where, _), length, count) in enumerate(zip(prompts, lengths, new)):
        embeds[row, :count] = prompt[0, length : length + count]
        positions[:, row, :count] = where[:, 0, length : length + count]
    output = session.step(embeds, positions, lengths, last=[count - 1 for count in new])
    for row, (length, count) in enumerate(zip(lengths, new)):
        states, logits = expected[row]
        assert relative_error(output.hidden_states[row, :count], states[0, length : length + count]) < 1e-5
        assert relative_error(output.logits[row], logits[0, length + count - 1]) < 1e-5


def test_the_caches_are_updated_in_place_and_nowhere_else(pair):
    model, decoder = pair
    embeds, positions, _ = random_prompt(12, model, seed=0)
    session = Session(decoder, 3)
    output = session.step(embeds, positions, [4], first_row=1)
    for given, returned in zip((*session.k, *session.v), (*output.k_caches, *output.v_caches)):
        assert returned.data_ptr() == given[1:2].data_ptr()
        touched = (given != 50).all(dim=-1).all(dim=1)
        assert touched[1].nonzero().flatten().tolist() == list(range(4, 16))
        assert not touched[[0, 2]].any()


def test_without_caches_rows_are_whole(pair):
    model, decoder = pair
    embeds, positions, _ = random_prompt(20, model, seed=5)
    embeds, positions = torch.cat([embeds, embeds.flip(1)]), positions.repeat(1, 2, 1)
    with torch.no_grad():
        found, _ = decoder.model(embeds, positions)
    assert relative_error(found, transformers_states(model, embeds, positions)[0]) < 1e-5


def test_tied_weights_are_one(pair):
    model, decoder = pair
    shared = decoder.lm_head.weight.data_ptr() == decoder.model.embed_tokens.weight.data_ptr()
    assert shared == model.config.tie_word_embeddings


def test_a_wrong_position_is_noticed(pair):
    """Random weights can hide an error; these do not."""
    model, decoder = pair
    embeds, positions, _ = random_prompt(20, model, seed=5)
    states, _ = transformers_states(model, embeds, positions)
    for axis in range(3):
        wrong = positions.clone()
        wrong[axis, 0, 9] += 1
        assert relative_error(Session(decoder, 1).step(embeds, wrong, [0]).hidden_states, states) > 1e-3


IMAGES = [(1, 10, 6), (1, 2, 4)]
VIDEOS = [(3, 8, 10)]


def multimodal_prompt():
    return [
        *[5, 6, 7],
        *vision_tokens(IMAGE, IMAGES[0]),
        *[11, 12],
        *vision_tokens(VIDEO, VIDEOS[0]),
        *vision_tokens(IMAGE, IMAGES[1]),
        *[20, 21, 22, 23],
    ]


@pytest.mark.parametrize(("tied", "seed"), [(True, 8), (False, 7)], ids=["tied", "untied"])
@torch.no_grad()
def test_greedy_tokens_about_images_and_a_video(tied, seed, tmp_path):
    """Both halves, from patches to tokens, against ``generate``; the seeds' answers are varied."""
    steps = 24
    model = random_model(model_config(tied=tied, text={"num_hidden_layers": 3}), seed)
    tokens = multimodal_prompt()
    images, video = random_patches(IMAGES, model.config), random_patches(VIDEOS, model.config, seed=1)
    generated = model.generate(
        input_ids=torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        mm_token_type_ids=token_type_ids(tokens)[None],
        pixel_values=images,
        image_grid_thw=torch.tensor(IMAGES),
        pixel_values_videos=video,
        video_grid_thw=torch.tensor(VIDEOS),
        second_per_grid_ts=torch.tensor([1.0]),
        do_sample=False,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = generated.sequences[0, len(tokens) :].tolist()
    assert len(expected) == steps
    assert len(set(expected)) > 5, "an answer of one token, over and over, tests little"

    checkpoint = Checkpoint(save_model(model, tmp_path))
    vision, decoder = VisionTransformer(checkpoint.config.vision).eval(), Decoder(checkpoint.config.text).eval()
    load_weights(vision, checkpoint, "visual.")
    load_weights(decoder, checkpoint)
    grids = (*IMAGES, *VIDEOS)
    layout = window_layout(grids, checkpoint.config.vision)
    indices = [getattr(layout, field.name) for field in fields(layout) if field.name != "tokens_per_item"]
    features = vision(pack_windows(torch.cat([images, video]), grids, model.config), *indices)
    first, second, clip = features.split(layout.tokens_per_item)

    ids = torch.tensor(tokens)
    embeds = decoder.model.embed_tokens(ids)
    embeds[ids == IMAGE] = torch.cat([first, second])
    embeds[ids == VIDEO] = clip
    positions, delta = rope_index(tokens, our_config(model.config), IMAGES, VIDEOS, [1.0])
    session = Session(decoder, 1)
    session.step(embeds[None, :50], positions[:, None, :50], [0])
    output = session.step(embeds[None, 50:], positions[:, None, 50:], [50])
    found = []
    for step in range(steps):
        assert relative_error(output.logits, generated.logits[step]) < 1e-4
        found.append(int(output.logits.argmax()))
        at = len(tokens) + step
        position = torch.full((3, 1, 1), at + delta)
        output = session.step(decoder.model.embed_tokens(torch.tensor([found[-1:]])), position, [at])
    assert found == expected
