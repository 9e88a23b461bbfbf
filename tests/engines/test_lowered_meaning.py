"""The lowered network means what ONNX Runtime computes; the network as TensorRT's parser leaves it does not."""

from dataclasses import replace
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.options import ATTENTION_MASKS
from qwen2vl_trt.engines.tensorrt_build import parse
from qwen2vl_trt.export.onnx_model import export_onnx
from qwen2vl_trt.rope_scaling import YarnScaling
from qwen2vl_trt.windows import window_layout
from tests.engines.network_interpreter import run_network
from tests.engines.test_lowering import parse_only
from tests.support.models import model_config, random_model, relative_error, save_model

CAPACITY = 24


@pytest.fixture(scope="module", params=["plain", "yarn"])
def exported(trt, tmp_path_factory, request):
    """A small random model in FP32 as TensorRT gets it, its cache of a static length."""
    folder = tmp_path_factory.mktemp("meaning")
    (folder / "graphs").mkdir()
    checkpoint = Checkpoint(save_model(random_model(model_config(vision={"depth": 2}), seed=3), folder / "checkpoint"))
    if request.param == "yarn":  # cosines and sines have a factor of their own
        scaling = YarnScaling(factor=4.0, original_max_position_embeddings=8)
        checkpoint.config = replace(checkpoint.config, text=replace(checkpoint.config.text, rope_scaling=scaling))
    export_onnx(checkpoint, folder / "graphs", torch.float32, CAPACITY)
    return SimpleNamespace(folder=folder / "graphs", config=checkpoint.config)


def with_onnxruntime(path, feeds):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # see runtime/backends/onnxruntime_runner.py
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    return dict(zip(names, map(torch.from_numpy, found)))


def vision_feeds(config):
    """Three images whose windows and lengths differ."""
    layout = window_layout(((1, 6, 10), (1, 2, 4), (1, 12, 8)), config.vision)
    names = ("window_lengths", "position_ids", "sequence_index", "sequence_lengths", "sequence_position", "merge_index")
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(*layout.sequence_position.shape, config.vision.qwen2_vl_dim, generator=generator)
    return {"pixel_values": pixels} | {name: getattr(layout, name) for name in names}


def decoder_feeds(config, sequence):
    """Three rows that hold 0, 5 and 11 tokens and get ``sequence`` more; what lies beyond them is not zero."""
    text, generator = config.text, torch.Generator().manual_seed(sequence)
    start = torch.tensor([0, 5, 11])
    feeds = {
        "inputs_embeds": torch.randn(3, sequence, text.hidden_size, generator=generator),
        "position_ids": (start[:, None] + torch.arange(sequence)).expand(3, 3, sequence).contiguous(),
        "cache_start": start,
        "kv_lengths": start + sequence,
        "last_token": torch.full((3,), sequence - 1),
    }
    shape = (3, text.num_key_value_heads, CAPACITY, text.head_dim)
    for kind in "kv":
        for layer in range(text.num_hidden_layers):
            feeds[f"{kind}_cache_{layer}"] = torch.randn(shape, generator=generator)
    return feeds


CASES = {"vision": None, "prefill": 7, "decode": 1}


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS)
@pytest.mark.parametrize("case", CASES)
def test_the_lowered_network_means_what_onnx_runtime_computes(trt, exported, case, attention_mask):
    sequence = CASES[case]
    path = exported.folder / f"{'decoder' if sequence else 'vision'}.onnx"
    feeds = decoder_feeds(exported.config, sequence) if sequence else vision_feeds(exported.config)
    expected = with_onnxruntime(path, feeds)
    lowered, parsed = parse(trt, path, attention_mask), parse_only(trt, path)
    found = run_network(trt, lowered.network, feeds)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 1e-5, name
    wrong = run_network(trt, parsed.network, feeds)
    answer = "logits" if sequence else "image_embeds"
    assert relative_error(wrong[answer], expected[answer]) > 0.05, "the parser does better: see engines/lowering.py"
