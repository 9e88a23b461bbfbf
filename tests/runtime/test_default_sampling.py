"""An answer without settings is what Transformers' ``generate`` gives, whatever the checkpoint says."""

import json
import shutil
from dataclasses import replace

import pytest
from transformers import GenerationConfig as TransformersGenerationConfig

from qwen2vl_trt import Pipeline, PipelineOptions, SamplingParams
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.runtime.backends.runners import open_engines
from tests.runtime.test_generation_config import PUBLISHED_3B, PUBLISHED_7B
from tests.runtime.test_pipeline import image_first, reference_inputs
from tests.support.engine_folders import BUILDS

REQUESTS = [image_first(seed) for seed in range(40, 46)]
KNOWN = {}


@pytest.fixture
def opened(engine_dirs, tmp_path):
    """A pipeline over engines whose checkpoint has another ``generation_config.json``."""

    def open_with(backend, content, generation_config="auto"):
        engines = open_engines(engine_dirs[backend], "cpu")
        for path in engines.checkpoint.companions:
            shutil.copy(path, tmp_path)
        own = json.loads((tmp_path / "generation_config.json").read_text())
        tokens = {name: own[name] for name in ("eos_token_id", "pad_token_id")}
        (tmp_path / "generation_config.json").write_text(json.dumps(tokens | content))
        engines.checkpoint.folder = tmp_path
        return Pipeline(engines, PipelineOptions(generation_config=generation_config))

    return open_with


def expected(reference, request, folder=None, **settings):
    """Tokens of Transformers' ``generate``, asked once for both backends."""
    read = None if folder is None else (folder / "generation_config.json").read_text()
    key = id(request), read, repr(settings)
    if key not in KNOWN:
        KNOWN[key] = generated(reference, request, folder, **settings)
    return KNOWN[key]


def generated(reference, request, folder, **settings):
    model, _ = reference
    inputs = reference_inputs(reference, request)
    before = model.generation_config
    if folder is not None:
        model.generation_config = TransformersGenerationConfig.from_pretrained(folder)
    try:
        return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    finally:
        model.generation_config = before


@pytest.mark.parametrize("backend", [backend for backend, _ in BUILDS])
@pytest.mark.parametrize("content", [PUBLISHED_3B, PUBLISHED_7B, {"repetition_penalty": 1.3}, {}])
def test_answers_without_settings_equal_transformers(backend, content, opened, reference, tmp_path):
    content = content | {"max_new_tokens": 20}
    pipeline = opened(backend, content)
    found = [output.token_ids for output in pipeline.generate(REQUESTS)]
    assert found == [expected(reference, request, tmp_path) for request in REQUESTS]
    greedy = [expected(reference, request, do_sample=False, max_new_tokens=20) for request in REQUESTS]
    assert (found == greedy) == ("repetition_penalty" not in content)

    plain = opened(backend, content, "none")
    assert [output.token_ids for output in plain.generate(REQUESTS, SamplingParams(max_tokens=20))] == greedy
    neutral = SamplingParams(temperature=0.0, repetition_penalty=1.0)
    assert [output.token_ids for output in pipeline.generate(REQUESTS, neutral)] == greedy


def test_none_is_the_way_out_of_what_is_not_implemented(opened):
    with pytest.raises(CheckpointError, match=r"num_beams is 4; only None or 1 is supported.*--generation-config none"):
        opened("torch", {"num_beams": 4})
    assert opened("torch", {"num_beams": 4}, "none").generate(REQUESTS[0], SamplingParams(2))[0].text is not None


def test_a_default_length_is_lowered_to_what_the_prompt_leaves_and_a_stated_one_is_not(opened):
    pipeline = opened("torch", {"max_new_tokens": 32768})
    request = replace(REQUESTS[0], images=[])
    output = pipeline.generate(request, SamplingParams(ignore_eos=True))[0]
    assert output.prompt_tokens + len(output.token_ids) == pipeline.profile.max_seq_len
    assert output.finish_reason == "length"
    stated = pipeline.generate(request, SamplingParams(max_tokens=32768))[0]
    assert "max_tokens 32,768 leaves no room" in str(stated.error)


def test_the_checkpoints_stop_strings_hold_unless_the_request_has_its_own(opened):
    pipeline = opened("torch", {})
    whole = pipeline.generate(REQUESTS[0], SamplingParams(max_tokens=40, ignore_eos=True))[0].text
    stop = whole[len(whole) // 2 :][:2]
    pipeline = opened("torch", {"stop_strings": [stop], "max_new_tokens": 40})
    cut = pipeline.generate(REQUESTS[0], SamplingParams(ignore_eos=True))[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]
    assert pipeline.generate(REQUESTS[0], SamplingParams(ignore_eos=True, stop=()))[0].text == whole
