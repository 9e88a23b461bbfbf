"""Marked graphs: what is added, what is left alone, and graphs whose blocks cannot be told apart."""

import onnx
import onnxruntime as ort
import pytest
import torch

from qwen2vl_trt.accuracy.recorder import Recorder, RecordingSession, marked_graph
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.runtime.backends.onnxruntime_runner import load_decoder, open_session
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.backends.steps import Chunk


@pytest.mark.parametrize(
    ("graph", "blocks", "prefix", "names"),
    [
        ("vision", 4, "visual.", ["visual.patch_embed", *(f"visual.blocks.{n}" for n in range(4))]),
        ("decoder", 4, "", [f"model.layers.{n}" for n in range(4)]),
    ],
)
def test_blocks_become_outputs_and_nothing_else_changes(tiny, graph, blocks, prefix, names):
    path = tiny["onnxruntime", "fp32"] / f"{graph}.onnx"
    model, marked = marked_graph(path, blocks, prefix)
    assert marked == names
    before, after = onnx.load(path, load_external_data=False), onnx.load_from_string(model)
    assert [value.name for value in after.graph.output] == [value.name for value in before.graph.output] + names
    del after.graph.output[-len(names) :], after.graph.node[-len(names) :]
    assert after == before


def test_the_marked_graph_takes_its_weights_from_the_engine_folder(tiny):
    path = tiny["onnxruntime", "fp32"] / "vision.onnx"
    model, marked = marked_graph(path, 4, "visual.")
    session = open_session(path, torch.device("cpu"), model)
    assert isinstance(session, ort.InferenceSession)
    assert [value.name for value in session.get_outputs()] == ["image_embeds", *marked]


def test_blocks_that_cannot_be_told_apart(tiny):
    path = tiny["onnxruntime", "fp32"] / "vision.onnx"
    with pytest.raises(EngineError, match=r"vision\.onnx: blocks cannot be told apart .* found 4 of 5"):
        marked_graph(path, 5, "visual.")


def test_steps_of_other_lengths_are_recorded_through_one_binding(tiny):
    """The runner keeps its bindings; results of an earlier run must not be taken for the next one's memory."""
    folder = tiny["onnxruntime", "fp32"]
    model, marked = marked_graph(folder / "decoder.onnx", 4, "")
    recorder, session = Recorder(), open_session(folder / "decoder.onnx", torch.device("cpu"), model)
    decoder = load_decoder(open_engines(folder, "cpu"), RecordingSession(session, marked, recorder))
    for length in (20, 8, 8, 1):
        decoder.step(
            [Chunk(0, 0, length)], decoder.embed(list(range(30, 30 + length))), torch.arange(length).expand(3, -1)
        )
    calls = recorder.calls[marked[-1]]
    assert [len(states) for states in calls] == [20, 8, 8, 1]
    for states in calls[1:]:
        torch.testing.assert_close(states, calls[0][: len(states)], rtol=0, atol=1e-4)
