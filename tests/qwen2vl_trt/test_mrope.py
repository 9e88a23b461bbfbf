"""M-RoPE positions, deltas and angles against Transformers, and by hand where Transformers differs from the weights.

Transformers 5 truncates the seconds between two frames to a whole number, and resumes after a video at max(h, w) even
where its time axis reaches further (see ``qwen2vl_trt/mrope.py``). Random mixes stay where both agree.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_trt.decoder import DecoderStack
from qwen2vl_trt.errors import PromptError
from qwen2vl_trt.mrope import mrope_config, rope_index, rotary_cos_sin
from tests.support.models import (
    FIRST_SPECIAL,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    model_config,
    our_config,
    random_model,
    relative_error,
    token_type_ids,
    vision_tokens,
)

TOKENS_PER_SECOND = 2
MIX = 12  # a seed whose conversation has images and videos


@pytest.fixture(scope="module")
def model():
    return random_model(model_config())


@pytest.fixture(scope="module")
def config(model):
    return our_config(model.config)


def random_mix(seed):
    """Tokens, image grids, video grids and seconds of a random conversation."""
    generator = random.Random(seed)
    tokens, images, videos, seconds = [], [], [], []

    def words(least=0):
        return [generator.randrange(FIRST_SPECIAL) for _ in range(generator.randint(least, 9))]

    for _ in range(generator.randint(0, 6)):
        tokens += words()
        rows, columns = generator.randint(1, 9), generator.randint(1, 9)
        if generator.random() < 0.5:
            images.append((1, 2 * rows, 2 * columns))
            tokens += vision_tokens(IMAGE, images[-1])
        else:
            step = generator.randint(0, 2)  # whole seconds between frames
            most = max(rows, columns) if step == 0 else (max(rows, columns) - 1) // (TOKENS_PER_SECOND * step) + 1
            videos.append((generator.randint(1, min(most, 5)), 2 * rows, 2 * columns))
            seconds.append(float(step))
            tokens += vision_tokens(VIDEO, videos[-1])
    return tokens + words(least=1), images, videos, seconds


def transformers_index(model, tokens, images, videos, seconds):
    positions, delta = model.model.get_rope_index(
        torch.tensor([tokens]),
        mm_token_type_ids=token_type_ids(tokens)[None],
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
    )
    return positions[:, 0], int(delta)


@pytest.mark.parametrize("seed", range(150))
def test_random_mixes_equal_transformers(model, config, seed):
    tokens, images, videos, seconds = random_mix(seed)
    positions, delta = rope_index(tokens, config, images, videos, seconds)
    expected, expected_delta = transformers_index(model, tokens, images, videos, seconds)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, expected)
    assert delta == expected_delta


def test_the_random_mixes_are_mixed():
    mixes = [random_mix(seed) for seed in range(150)]
    assert sum(1 for _, images, videos, _ in mixes if images and videos) > 30
    assert sum(1 for _, _, videos, _ in mixes for t, _, _ in videos if t > 1) > 100
    assert sum(1 for _, images, videos, _ in mixes if len(images) + len(videos) > 3) > 20
    assert {second for _, _, _, seconds in mixes for second in seconds} == {0.0, 1.0, 2.0}
    assert any(not images and not videos for _, images, videos, _ in mixes)


def test_a_video_whose_time_reaches_further_than_its_sides(config):
    """3 frames of 1 x 2 groups, a second apart: time 0, 2, 4; the text resumes at 2 + 5, not at 2 + max(h, w)."""
    tokens = [7, VISION_START, *[VIDEO] * 6, VISION_END, 8]
    positions, delta = rope_index(tokens, config, video_grids=[(3, 2, 4)], second_per_grid_ts=[1.0])
    assert positions.tolist() == [
        [0, 1, 2, 2, 4, 4, 6, 6, 7, 8],
        [0, 1, 2, 2, 2, 2, 2, 2, 7, 8],
        [0, 1, 2, 3, 2, 3, 2, 3, 7, 8],
    ]
    assert delta == 9 - 10


def test_seconds_are_rounded_down_after_the_multiplication(config):
    """4 frames of one group, 0.75 s apart: 0, 1.5, 3, 4.5 units of time."""
    positions, delta = rope_index([VIDEO] * 4 + [5], config, video_grids=[(4, 2, 2)], second_per_grid_ts=[0.75])
    assert positions.tolist() == [[0, 1, 3, 4, 5], [0, 0, 0, 0, 5], [0, 0, 0, 0, 5]]
    assert delta == 1


def test_frames_less_than_a_unit_of_time_apart(config):
    """5 frames, 0.2 s apart: 0, 0.4, 0.8, 1.2, 1.6; two groups wide."""
    tokens = [VIDEO] * 10 + [5, 6]
    positions, delta = rope_index(tokens, config, video_grids=[(5, 2, 4)], second_per_grid_ts=[0.2])
    assert positions.tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 3],
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3],
    ]
    assert delta == 4 - 12


def test_each_video_has_its_own_seconds_and_the_next_item_follows_its_time(config):
    tokens = [VISION_START, VIDEO, VIDEO, VISION_END, IMAGE, IMAGE, 3, VIDEO, VIDEO, VIDEO]
    positions, delta = rope_index(
        tokens, config, image_grids=[(1, 2, 4)], video_grids=[(2, 2, 2), (3, 2, 2)], second_per_grid_ts=[4.0, 0.5]
    )
    assert positions.tolist() == [
        [0, 1, 9, 10, 11, 11, 13, 14, 15, 16],
        [0, 1, 1, 10, 11, 11, 13, 14, 14, 14],
        [0, 1, 1, 10, 11, 12, 13, 14, 14, 14],
    ]
    assert delta == 17 - 10


def test_seconds_default_to_one(config):
    tokens = [VIDEO] * 3 + [1]
    default = rope_index(tokens, config, video_grids=[(3, 2, 2)])
    given_one = rope_index(tokens, config, video_grids=[(3, 2, 2)], second_per_grid_ts=[1.0])
    assert torch.equal(default[0], given_one[0])
    assert default[0][0].tolist() == [0, 2, 4, 5]


def test_items_with_nothing_between_them(config):
    positions, _ = rope_index([IMAGE] * 5 + [1], config, image_grids=[(1, 2, 2), (1, 4, 4)])
    assert positions.tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]


def test_text_counts_on_all_axes(config):
    positions, delta = rope_index([5, 6, 7], config)
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert delta == 0


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(1000, 10**6), seconds=st.floats(0, 20))
def test_text_after_a_video_is_always_past_everything(seed, seconds):
    """Whatever the seconds: no text position is used twice, and the delta continues the last one."""
    config = our_config(model_config())
    tokens, images, videos, _ = random_mix(seed)
    positions, delta = rope_index(tokens, config, images, videos, [seconds] * len(videos))
    before = -1
    for i, token in enumerate(tokens):
        if token not in (IMAGE, VIDEO):
            assert positions[:, i].tolist() == [before + 1] * 3
        before = int(positions[:, : i + 1].max())
    assert len(tokens) + delta == before + 1


@pytest.mark.parametrize(
    ("tokens", "images", "videos", "said"),
    [
        ([IMAGE] * 4, [], [], "more vision placeholders"),
        ([IMAGE] * 5, [(1, 4, 4)], [], "more vision placeholders"),
        ([VIDEO] * 4, [(1, 4, 4)], [], "more vision placeholders"),
        ([IMAGE] * 3, [(1, 4, 4)], [], "fewer vision placeholders"),
        ([IMAGE] * 4 + [1], [(1, 4, 4), (1, 2, 2)], [], "fewer vision placeholders"),
        ([1, 2], [], [(1, 2, 2)], "fewer vision placeholders"),
    ],
)
def test_placeholders_that_do_not_add_up(config, tokens, images, videos, said):
    with pytest.raises(PromptError, match=said):
        rope_index(tokens, config, images, videos)


@pytest.mark.parametrize("rope_theta", [100.0, 1e6])
@pytest.mark.parametrize("text", [{}, {"num_attention_heads": 2}, {"hidden_size": 160}], ids=["16", "32", "40"])
def test_angles_equal_transformers(text, rope_theta):
    model = random_model(model_config(text=text, rope_theta=rope_theta))
    config = our_config(model.config).text
    tokens, images, videos, seconds = random_mix(MIX)
    positions, _ = rope_index(tokens, our_config(model.config), images, videos, seconds)
    stack = DecoderStack(config)
    both = rotary_cos_sin(positions[:, None], stack.inv_freq, config.mrope_section, stack.rotary_scale)
    for found, expected in zip(both, transformers_rotary(model, positions)):
        assert found.shape == (1, len(tokens), config.head_dim // 2)
        assert relative_error(torch.cat([found, found], dim=-1), expected) < 1e-6


def transformers_rotary(model, positions):
    """cos and sin ``[1, S, D]`` with the sections applied as Transformers' attention does."""
    rotary = model.model.language_model.rotary_emb
    both = rotary(torch.zeros(1), positions[:, None])
    if both[0].shape[0] == 1:  # newer releases apply the sections inside
        return both
    sections = model.config.text_config.rope_parameters["mrope_section"] * 2
    return tuple(
        torch.cat([part[i % 3] for i, part in enumerate(values.split(sections, dim=-1))], dim=-1) for values in both
    )


def test_mrope_config_is_tensorrt_llms(model, config):
    tokens, images, videos, seconds = random_mix(MIX)
    assert images
    assert videos
    positions, delta = rope_index(tokens, config, images, videos, seconds)
    assert set(mrope_config(positions, delta)) == {"mrope_position_ids", "mrope_position_deltas"}
    found = mrope_config(positions, delta, config.text)
    assert set(found) == {"mrope_position_ids", "mrope_rotary_cos_sin", "mrope_position_deltas"}
    assert torch.equal(found["mrope_position_ids"], positions[:, None])  # [3, 1, S]

    deltas = found["mrope_position_deltas"]
    assert (deltas.dtype, deltas.shape, deltas.item()) == (torch.int32, (1, 1), delta)

    length, dim = config.text.max_position_embeddings, config.text.head_dim
    table = found["mrope_rotary_cos_sin"]
    assert (table.dtype, table.shape) == (torch.float32, (1, length * dim))
    table = table.view(length, dim // 2, 2)  # a cosine and a sine of each frequency, in turns
    later = (torch.arange(len(tokens), length) + delta).expand(3, -1)
    cos, sin = transformers_rotary(model, torch.cat([positions, later], dim=1))
    assert relative_error(table[..., 0], cos[0, :, : dim // 2]) < 1e-6
    assert relative_error(table[..., 1], sin[0, :, : dim // 2]) < 1e-6
