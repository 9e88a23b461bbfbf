import math
import shutil

import pytest
import torch
from safetensors import safe_open

from qwen2vl_trt.benchmarks import random_model
from qwen2vl_trt.benchmarks.random_model import config_of, random_checkpoint, write_sparse_checkpoint
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.published import SHAPES
from tests.support.models import SMALL_SHAPE


@pytest.fixture
def small(monkeypatch):
    """A published shape of a size that a test can write."""
    monkeypatch.setitem(SHAPES, "small", SMALL_SHAPE)
    return "small"


@pytest.mark.parametrize(("name", "parameters"), [("Qwen2.5-VL-3B", 3.75e9), ("Qwen2.5-VL-7B", 8.29e9)])
def test_shapes_are_those_of_the_published_checkpoints(name, parameters):
    raw = config_of(name)
    config = Qwen2VLConfig.from_dict(raw)
    assert config.vision.fullatt_block_indexes == (7, 15, 23, 31)
    assert sum(map(math.prod, random_model.tensor_shapes(raw).values())) == pytest.approx(parameters, rel=0.01)


def test_a_cut_shape_keeps_a_block_of_full_attention():
    config = Qwen2VLConfig.from_dict(config_of("Qwen2.5-VL-3B", layers=2, blocks=9))
    assert (config.text.num_hidden_layers, config.vision.depth) == (2, 9)
    assert config.vision.fullatt_block_indexes == (7,)
    assert config_of("Qwen2.5-VL-7B", 1, 3)["vision_config"]["fullatt_block_indexes"] == [2]
    with pytest.raises(BenchmarkError, match=r"known: Qwen2\.5-VL-3B, .*, Qwen2\.5-VL-72B"):
        config_of("tiny")
    with pytest.raises(BenchmarkError, match="must be at least 1"):
        config_of("Qwen2.5-VL-3B", 0)


def test_a_random_checkpoint_loads_in_transformers(small, tmp_path):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = random_checkpoint(small, 1, 2, tmp_path)
    assert folder == tmp_path / "small-random-1-2"
    with safe_open(folder / "model.safetensors", "pt") as file:
        norm = file.get_tensor("model.layers.0.input_layernorm.weight")
        weight = file.get_tensor("model.layers.0.mlp.down_proj.weight").float()
    assert (norm == 1).all()
    assert weight.std() == pytest.approx(0.02, rel=0.05)
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert random_checkpoint(small, 1, 2, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_sparse_checkpoint_has_the_same_tensors_and_no_content(small, tmp_path):
    written = random_checkpoint(small, None, 1, tmp_path)
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    size = write_sparse_checkpoint(sparse, config_of(small, None, 1))
    one, other = Checkpoint(written), Checkpoint(sparse)
    assert {n: one.locate(n).shape for n in one.names} == {n: other.locate(n).shape for n in other.names}
    assert not other.load("model.embed_tokens.weight").any()
    assert size == sum(2 * math.prod(other.locate(name).shape) for name in other.names)


def test_no_room_and_an_interruption_leave_nothing(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(BenchmarkError, match=r"0\.0 GB free, small's weights take 0\.\d GB"):
            random_checkpoint(small, 1, 1, tmp_path)

    def interrupted(folder, config):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(random_model, "write_random_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_checkpoint(small, 1, 1, tmp_path)
    assert list(tmp_path.iterdir()) == []
