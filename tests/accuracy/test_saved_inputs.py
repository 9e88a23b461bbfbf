"""Saved inputs: Polygraphy loads them, runs the exported graphs as they lie, and reproduces what the pipeline gives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.json import load_json

from qwen2vl_trt import Pipeline, Request
from qwen2vl_trt.accuracy.saved_inputs import SavedInputs
from qwen2vl_trt.errors import CompareError
from qwen2vl_trt.runtime.backends.runners import open_engines
from tests.support.models import relative_error

PICTURE = str(Path(__file__).resolve().parent.parent.parent / "docs" / "digits.png")
PROMPT = "What digits are in the image?"


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    from qwen2vl_trt.commands import call

    folder = tmp_path_factory.mktemp("saved")
    engine = str(tiny["onnxruntime", "fp32"])
    call("compare", ["--engine-dir", engine, "--save-inputs", str(folder), "--image", PICTURE, "--prompt", PROMPT])
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny):
    return Pipeline.from_engine_dir(tiny["onnxruntime", "fp32"], "cpu")


def outputs(tiny, saved, graph):
    """Of every saved feed, from Polygraphy's own ONNX Runtime runner on the file in the engine folder."""
    session = SessionFromOnnx(str(tiny["onnxruntime", "fp32"] / f"{graph}.onnx"))
    with OnnxrtRunner(session) as runner:
        return [dict(runner.infer(feed)) for feed in load_json(str(saved / f"{graph}.json"))]


def test_the_vision_graph_reproduces_the_embeddings(tiny, saved, pipeline):
    (found,) = outputs(tiny, saved, "vision")
    expected = pipeline.embed_images([PICTURE])[0]
    assert relative_error(torch.from_numpy(found["image_embeds"]), expected) < 1e-6


def test_the_decoder_reproduces_prefill_and_a_decode_step(tiny, saved, pipeline):
    request = Request(PROMPT, [PICTURE])
    prefill, decode = outputs(tiny, saved, "decoder")
    expected = pipeline.hidden_states([request])[0]
    assert relative_error(torch.from_numpy(prefill["hidden_states"][0]), expected) < 1e-6
    answer = pipeline.generate(request)[0].token_ids
    assert [int(step["logits"].argmax()) for step in (prefill, decode)] == answer[:2]


def test_raw_bytes_are_the_same_numbers(saved):
    for graph, count in (("vision", 1), ("decoder", 2)):
        feeds = load_json(str(saved / f"{graph}.json"))
        assert len(feeds) == count
        for number, feed in enumerate(feeds):
            folder = saved / graph / f"{number:03d}"
            shapes, files = (folder / "trtexec.txt").read_text().splitlines()
            assert shapes.startswith("--shapes=")
            for name, array in feed.items():
                assert f"{name}:{'x'.join(map(str, array.shape))}" in shapes.removeprefix("--shapes=").split(",")
                assert f"{name}:{name}.bin" in files.removeprefix("--loadInputs=").split(",")
                assert np.array_equal(np.fromfile(folder / f"{name}.bin", array.dtype).reshape(array.shape), array)


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_polygraphy_run_takes_the_engine_folder_as_it_is(tiny, saved, graph):
    """The command of docs/guide/accuracy.md."""
    model = tiny["onnxruntime", "fp32"] / f"{graph}.onnx"
    tool = Path(sys.executable).with_name("polygraphy")
    arguments = ["run", model, "--onnxrt", "--load-inputs", saved / f"{graph}.json"]
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "PASSED" in done.stdout


def test_bf16_inputs_survive(tiny, tmp_path):
    engines = open_engines(tiny["onnxruntime", "fp32"], "cpu")
    saved = SavedInputs(tmp_path, engines)
    values = torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16)
    saved("vision", {"pixel_values": values})
    saved.write()
    (feed,) = load_json(str(tmp_path / "vision.json"))
    assert torch.equal(feed["pixel_values"], values)
    assert np.fromfile(tmp_path / "vision" / "000" / "pixel_values.bin", np.uint16).tolist() == [0x3FC0, 0xC010]


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CompareError, match="cannot be made"):
        SavedInputs(tmp_path / "file" / "inputs", open_engines(tiny["onnxruntime", "fp32"], "cpu"))
