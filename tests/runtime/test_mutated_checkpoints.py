"""JSON files of a checkpoint with senseless content: an error of ours in one line, or a configuration that works."""

import json
import math
import random

import pytest
import torch

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.manifest import MANIFEST_FILE, Manifest
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import Qwen2VLError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.mrope import rotary_frequencies
from qwen2vl_trt.runtime.generation_config import GenerationConfig
from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings, smart_resize
from tests.qwen2vl_trt.test_config import PUBLISHED
from tests.qwen2vl_trt.test_rope_scaling import QWENS_RECIPE, layouts

PIXELS = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
GENERATION = {
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 1e-06,
}
TINY = resolve_model("tiny").folder
OF_TINY = {
    name: json.loads((TINY / name).read_text())
    for name in (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    )
}
CHECKPOINTS = {
    "tiny": OF_TINY,
    "published": {
        "config.json": PUBLISHED["7B"],
        "preprocessor_config.json": PIXELS,
        "generation_config.json": GENERATION,
    },
    "of Transformers 5": {
        "config.json": layouts(QWENS_RECIPE)["nested, of 5"],
        "processor_config.json": {
            "image_processor": PIXELS,
            "video_processor": PIXELS | {"fps": 2.0, "min_frames": 4, "max_frames": 768},
        },
        "generation_config.json": GENERATION,
    },
}
DEEP, HUGE = "DEEP", "HUGE"  # put in afterwards: Python's encoder takes neither
SENSELESS = [
    *(None, True, False, 0, -1, 1, 7, 2.0, 1.5, -0.0, 1e308, 1e-320, 10**30, -(10**30), 2**31, 2**63),
    *(math.nan, math.inf, -math.inf),
    *(
        "",
        "x",
        "5",
        "silu",
        "\x00",
        "ü" * 5000,
        "\ud800",
        HUGE,
        [],
        [[]],
        [1],
        [None] * 3,
        [[16], 24, 24],
        [1e999],
        {},
        {"a": 1},
        DEEP,
    ),
]


def places(value, path=()):
    """The path of everything in a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(content, rng):
    """The text of a JSON file with one to three faults."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice([path for path in places(content) if path] or [()])
        if not path:
            return json.dumps(rng.choice(SENSELESS))
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        kind = rng.random()
        if kind < 0.15:
            del owner[path[-1]]
        elif kind < 0.25 and isinstance(owner, dict):
            owner[rng.choice(["_", "attention_bias", "sliding_window", "size", "head_dim", "rope_parameters"])] = (
                rng.choice(SENSELESS)
            )
        else:
            owner[path[-1]] = rng.choice(SENSELESS)
    text = json.dumps(content).replace(json.dumps(DEEP), "[" * 200_000 + "]" * 200_000)
    text = text.replace(json.dumps(HUGE), "9" * 5000)
    spoiled = rng.random()
    if spoiled < 0.02:
        return "\ufeff" + text
    if spoiled < 0.04:
        return text[: rng.randrange(len(text))]
    if spoiled < 0.06:
        return text[:-1] + ', "hidden_size": 1, "hidden_size": "x"}'
    if spoiled < 0.08:
        return text.replace('"', '"\\ud800', 1)
    return text


def read(folder):
    """Everything that a checkpoint's JSON says, used as far as it goes without weights."""
    config = Qwen2VLConfig.from_folder(folder)
    settings = PreprocessorSettings.from_folder(folder)
    generation = GenerationConfig.from_folder(folder)
    inv_freq, scale = rotary_frequencies(config.text)
    assert inv_freq.shape == (sum(config.text.mrope_section),)
    assert torch.isfinite(inv_freq).all()
    assert math.isfinite(scale)
    assert config.text.num_attention_heads % config.text.num_key_value_heads == 0
    assert config.vision.window_slots == config.vision.window_groups**2 * config.vision.merge_unit
    assert config.vision.window_groups >= 1
    for pixels in (settings.image, settings.video):
        height, width = smart_resize(300, 400, config.vision.image_factor, pixels.min_pixels, pixels.max_pixels)
        assert height % config.vision.image_factor == width % config.vision.image_factor == 0
        assert all(deviation > 0 for deviation in pixels.image_std)
    assert settings.sampling.indices(100, 25.0)
    generation.defaults.with_defaults()


def check(message, named=""):
    assert named in message
    assert "\n" not in message
    assert len(message) < 500, message[:1000]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("seed", range(4))
def test_a_checkpoint_with_senseless_json(tmp_path, name, seed):
    rng = random.Random(f"{name} {seed}")
    messages = []
    for _ in range(60):
        spoiled = rng.choice(list(CHECKPOINTS[name]))
        for file, content in CHECKPOINTS[name].items():
            text = mutated(content, rng) if file == spoiled else json.dumps(content)
            (tmp_path / file).write_text(text)
        try:
            read(tmp_path)
        except Qwen2VLError as error:
            messages.append(str(error))
    assert 30 <= len(messages) < 60  # most mutations are faults, some are none
    for message in messages:
        check(message)
        assert ".json" in message


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_is_read_as_it_is(tmp_path, name):
    for file, content in CHECKPOINTS[name].items():
        (tmp_path / file).write_text(json.dumps(content))
    read(tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_a_senseless_manifest(tmp_path, seed):
    rng = random.Random(seed)
    Manifest("m", "0" * 64, "torch", "fp32", BuildProfile(), {}, {"torch": "2.13"}).write(tmp_path)
    content = json.loads((tmp_path / MANIFEST_FILE).read_text())
    for _ in range(100):
        (tmp_path / MANIFEST_FILE).write_text(mutated(content, rng))
        try:
            Manifest.read(tmp_path)
        except Qwen2VLError as error:
            check(str(error))
