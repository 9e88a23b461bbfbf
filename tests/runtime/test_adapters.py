"""Requests with different LoRA adapters in one batch, each against engines that have its adapter merged."""

import shutil
from dataclasses import replace

import pytest

from qwen2vl_trt import CheckpointError, EngineError, Pipeline, PipelineOptions, PromptError, Request, SamplingParams
from tests.support.adapters import ATTENTION, MLP, factors, modules, write_adapter
from tests.support.bounds import FP32_BEHIND_BOTH
from tests.support.engine_folders import PROFILE, build
from tests.support.models import edit_checkpoint, relative_error
from tests.support.requests import answers, random_request

GREEDY = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """The checkpoint in FP32: a merged weight is then not rounded."""
    copy = shutil.copytree(checkpoint, tmp_path_factory.mktemp("fp32") / "model")
    edit_checkpoint(copy, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    return copy


@pytest.fixture(scope="module")
def modules_of(reference, tmp_path_factory):
    """Two adapters' folders, of different layers and ranks."""
    model, parent = reference[0], tmp_path_factory.mktemp("adapters")
    decoder = [f"layers.{number}.{part}" for number in (0, 1) for part in ("mlp.up_proj", "mlp.gate_proj")]
    attention = factors(model, modules(model, *ATTENTION), rank=3, seed=1)
    other = factors(model, modules(model, *decoder, "q_proj"), seed=2)
    config = {"target_modules": r".*language_model.*(gate|up|q)_proj", "use_rslora": True}
    return {
        "one": write_adapter(parent / "one", attention, "published", r=3, target_modules=list(ATTENTION)),
        "two": write_adapter(parent / "two", other, **config),
    }


@pytest.fixture(scope="module")
def pipeline(folder, modules_of, tmp_path_factory):
    engines = build(folder, tmp_path_factory.mktemp("engines") / "torch", "torch")
    return Pipeline.from_engine_dir(engines, "cpu", PipelineOptions(lora_modules=modules_of))


@pytest.fixture(scope="module")
def merged(folder, modules_of, tmp_path_factory):
    """A pipeline a name, None the plain model's."""
    made = {}
    for name in (None, *modules_of):
        made[name] = Pipeline.from_pretrained(
            folder,
            "torch",
            "fp32",
            "cpu",
            lora=modules_of.get(name),
            engine_dir=tmp_path_factory.mktemp("merged") / "engines",
            **PROFILE.as_dict(),
        )
    return made


def of(request, name):
    return replace(request, adapter=name)


NAMES = ["one", None, "two", "one", "two", None, "one"]


def test_each_answers_as_if_it_were_merged(pipeline, merged):
    """Seven requests over four slots: they join and leave a batch in which every row may have another adapter."""
    requests = [random_request(seed) for seed in range(len(NAMES))]
    found = pipeline.generate([of(request, name) for request, name in zip(requests, NAMES)], GREEDY)
    expected = [merged[name].generate([request], GREEDY)[0] for request, name in zip(requests, NAMES)]
    assert answers(found) == answers(expected)
    plain = merged[None].generate(requests, GREEDY)
    changed = [a != b for a, b in zip(answers(found), answers(plain))]
    assert changed == [name is not None for name in NAMES]


def test_hidden_states_are_those_of_merged_weights(pipeline, merged):
    requests = [random_request(seed) for seed in range(4)]
    names = ["two", "one", None, "two"]
    found = pipeline.hidden_states([of(request, name) for request, name in zip(requests, names)])
    for request, name, states in zip(requests, names, found):
        assert relative_error(states, merged[name].hidden_states([request])[0]) < FP32_BEHIND_BOTH
        if name:
            assert relative_error(states, merged[None].hidden_states([request])[0]) > 0.01


def test_what_one_adapter_wrote_into_the_cache_no_other_reads(pipeline, merged):
    """The same prompt, one after the other: only one of the same adapter finds it."""
    request = Request("What? " * 40)
    reused = []
    for name in ("one", "one", "two", None, "two", None):
        (output,) = pipeline.generate([of(request, name)], GREEDY)
        assert output.token_ids == merged[name].generate([request], GREEDY)[0].token_ids
        reused.append(output.reused_tokens > 0)
    assert reused == [False, True, False, False, True, True]


def test_a_salt_and_an_adapter_are_two_things(pipeline):
    request = Request("Where? " * 40, cache_salt="mine")
    assert pipeline.generate([request], GREEDY)[0].reused_tokens == 0
    assert pipeline.generate([of(request, "one")], GREEDY)[0].reused_tokens == 0
    salted = Request(request.prompt, cache_salt="one", adapter="one")
    assert pipeline.generate([salted], GREEDY)[0].reused_tokens == 0
    assert pipeline.generate([of(request, "one")], GREEDY)[0].reused_tokens > 0


def test_in_bf16_beside_packed_layers(folder, modules_of, tmp_path):
    """Rounded at other places than merged weights are, and by no more."""
    engines = build(folder, tmp_path / "engines", "torch", "bf16")
    found = Pipeline.from_engine_dir(engines, "cpu", PipelineOptions(lora_modules=modules_of))
    request = Request("What is there?")
    exact = Pipeline.from_engine_dir(build(folder, tmp_path / "fp32", "torch"), "cpu", found.options)
    for name in (None, *modules_of):
        states, expected = (each.hidden_states([of(request, name)])[0].float() for each in (found, exact))
        assert float((states - expected).norm() / expected.norm()) < 0.05


def test_what_is_refused(pipeline, engine_dirs, modules_of, reference, tmp_path):
    for call in (pipeline.generate, pipeline.hidden_states, pipeline.submit):
        with pytest.raises(PromptError, match=r"there is no adapter 'three'; this pipeline has one, two"):
            call(Request("What?", adapter="three"))
    plain = Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")
    with pytest.raises(PromptError, match=r"no adapter 'one'; this pipeline has none \(PipelineOptions\(lora_modules="):
        plain.submit(Request("What?", adapter="one"))
    options = PipelineOptions(lora_modules=modules_of)
    with pytest.raises(EngineError, match=r"run with backend torch on a CPU, not with onnxruntime on cpu; merge one"):
        Pipeline.from_engine_dir(engine_dirs["onnxruntime"], "cpu", options)
    model = reference[0]
    tensors = factors(model, modules(model, "q_proj", "qkv"))
    wider = write_adapter(tmp_path / "wider", tensors, target_modules=["q_proj", "qkv"])
    saved = {f"model.visual.merger.{name}": each for name, each in model.model.visual.merger.state_dict().items()}
    whole = write_adapter(
        tmp_path / "whole",
        factors(model, modules(model, *MLP)) | saved,
        target_modules=list(MLP),
        modules_to_save=["merger"],
    )
    for adapter, said in ((wider, r"attn\.qkv"), (whole, r"merger\.ln_q\.weight, .* more")):
        with pytest.raises(
            CheckpointError, match=rf"it changes .*{said}.*; an adapter beside others .* --lora merges this"
        ):
            Pipeline.from_engine_dir(engine_dirs["torch"], "cpu", PipelineOptions(lora_modules={"x": adapter}))
