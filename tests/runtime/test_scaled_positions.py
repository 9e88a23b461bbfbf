"""A model with scaled rotary positions against Transformers, within and beyond the trained positions."""

import json

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from qwen2vl_trt import Pipeline, SamplingParams
from tests.runtime.test_pipeline import image_first, reference_inputs
from tests.support.engine_folders import build, write_checkpoint
from tests.support.models import relative_error

TRAINED = 64  # positions
SCALINGS = {
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 1.4,
        "truncate": False,
    },
    "linear": {"type": "linear", "factor": 4.0},
}
SHORT, LONG = image_first(60, images=0, words=4), image_first(61, images=2, words=60)


@pytest.mark.parametrize(
    ("scaling", "backend"),
    [
        ("yarn", "torch"),
        ("yarn, not truncated", "torch"),
        ("yarn, not truncated", "onnxruntime"),
        ("linear", "onnxruntime"),
    ],
)
def test_hidden_states_and_greedy_tokens_equal_transformers(scaling, backend, reference, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = SCALINGS[scaling] | {"mrope_section": config["rope_scaling"]["mrope_section"]}
    path.write_text(json.dumps(config))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.text_config.rope_parameters["rope_type"] == scaling.split(",")[0]
    scaled_reference = model, AutoProcessor.from_pretrained(folder)
    pipeline = Pipeline.from_engine_dir(build(folder, tmp_path / "engines", backend), "cpu")
    lengths = []
    for request in (SHORT, LONG):
        inputs = reference_inputs(scaled_reference, request)
        lengths.append(inputs["input_ids"].shape[1])
        with torch.no_grad():
            expected = scaled_reference[0](**inputs, output_hidden_states=True).hidden_states[-1][0]
            plain = reference[0](**inputs, output_hidden_states=True).hidden_states[-1][0]
        found = pipeline.hidden_states([request])[0]
        assert relative_error(found, expected) < 1e-5
        assert relative_error(found, plain) > 1e-2  # the same weights without scaling
        tokens = scaled_reference[0].generate(**inputs, do_sample=False, max_new_tokens=24)[0, lengths[-1] :]
        answer = pipeline.generate(request, SamplingParams(max_tokens=24))[0]
        assert answer.token_ids == tokens.tolist()
    assert lengths[0] < TRAINED < lengths[1]
