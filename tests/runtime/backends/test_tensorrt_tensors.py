"""What an engine is compared with, and which profile a batch runs in."""

from dataclasses import replace

import onnx
import pytest
import torch

from qwen2vl_trt.engines.tensorrt_profiles import Range
from qwen2vl_trt.errors import EngineError, LimitError
from qwen2vl_trt.runtime.backends.tensorrt_tensors import EngineTensor, check_tensors, choose_profile, expected_tensors

PROFILES = (
    {"batch": Range(1, 1, 4), "sequence": Range(1, 100, 300)},
    {"batch": Range(1, 4, 4), "sequence": Range(1, 1, 1)},
)
EMBEDS = EngineTensor((-1, -1, 8), torch.bfloat16, True, None, (((1, 1, 8), (4, 300, 8)), ((1, 1, 8), (4, 1, 8))))
CACHE = EngineTensor((-1, 2, 64, 4), torch.bfloat16, True, None, (((1, 2, 64, 4), (4, 2, 64, 4)),) * 2)
UPDATED = EngineTensor((-1, 2, 64, 4), torch.bfloat16, False, "k_cache_0")
TENSORS = {"inputs_embeds": EMBEDS, "k_cache_0": CACHE, "new_k_cache_0": UPDATED}


def shapes(batch, sequence, capacity=64):
    return {"inputs_embeds": (batch, sequence, 8), "k_cache_0": (batch, 2, capacity, 4)}


def test_a_graph_says_what_an_engine_must_have(tmp_path):
    bf16 = onnx.TensorProto.BFLOAT16
    inputs = [
        onnx.helper.make_tensor_value_info("inputs_embeds", bf16, ["batch", "sequence", 8]),
        onnx.helper.make_tensor_value_info("k_cache_0", bf16, ["batch", 2, 64, 4]),
    ]
    outputs = [onnx.helper.make_tensor_value_info("new_k_cache_0", bf16, ["batch", 2, 64, 4])]
    path = tmp_path / "graph.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "graph", inputs, outputs)), path)
    assert expected_tensors(path, PROFILES) == TENSORS


@pytest.mark.parametrize(("batch", "sequence", "profile"), [(1, 1, 1), (4, 1, 1), (1, 2, 0), (4, 300, 0)], ids=str)
def test_the_narrowest_profile_that_fits(batch, sequence, profile):
    assert choose_profile(TENSORS, shapes(batch, sequence), "decoder") == profile


def test_the_order_of_profiles_does_not_matter():
    turned = {
        name: replace(tensor, profiles=tensor.profiles[::-1]) if tensor.is_input else tensor
        for name, tensor in TENSORS.items()
    }
    assert choose_profile(turned, shapes(1, 1), "decoder") == 0
    assert choose_profile(turned, shapes(1, 2), "decoder") == 1


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (shapes(1, 301), r"decoder engine: inputs_embeds is 1 x 301 x 8; it was built for 1 x 1 x 8 to 4 x 300 x 8"),
        (shapes(0, 1), r"inputs_embeds is 0 x 1 x 8; it was built for 1 x 1 x 8 to 4 x"),
        (shapes(5, 1), r"inputs_embeds is 5 x 1 x 8"),
        (shapes(1, 1, capacity=63), r"k_cache_0 is 1 x 2 x 63 x 4; it was built for 1 x 2 x 64 x 4 to 4 x 2 x 64 x 4"),
        ({**shapes(1, 1), "inputs_embeds": (1, 8)}, "inputs_embeds is 1 x 8"),
    ],
)
def test_shapes_outside_every_profile(found, said):
    with pytest.raises(LimitError, match=said):
        choose_profile(TENSORS, found, "decoder")


def test_an_engine_that_is_what_its_folder_says():
    check_tensors(TENSORS, dict(TENSORS), "decoder.engine")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("new_k_cache_0", None, "it lacks tensor 'new_k_cache_0'"),
        ("surprise", {}, "it has an unknown tensor 'surprise'"),
        (
            "inputs_embeds",
            {"dtype": torch.float16},
            "dtype of tensor 'inputs_embeds' is torch.float16, .* torch.bfloat16",
        ),
        (
            "k_cache_0",
            {"shape": (-1, 2, 32, 4)},
            r"shape of tensor 'k_cache_0' is \(-1, 2, 32, 4\), .* \(-1, 2, 64, 4\)",
        ),
        ("new_k_cache_0", {"alias": None}, "alias of tensor 'new_k_cache_0' is None, .* say k_cache_0"),
        ("k_cache_0", {"is_input": False}, "is_input of tensor 'k_cache_0' is False"),
        ("k_cache_0", {"profiles": CACHE.profiles[:1]}, "profiles of tensor 'k_cache_0'"),
    ],
)
def test_an_engine_of_another_folder(name, changes, said):
    found = dict(TENSORS)
    if changes is None:
        del found[name]
    else:
        found[name] = replace(found.get(name, CACHE), **changes)
    with pytest.raises(EngineError, match=rf"^decoder\.engine is not of this folder: {said}.*Rebuild\.$"):
        check_tensors(found, TENSORS, "decoder.engine")
