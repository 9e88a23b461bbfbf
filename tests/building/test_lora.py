"""Engines of a model with an adapter: Transformers' answers with the sum put in by hand, and when to build."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwen2vl_trt import BuildError, CheckpointError, Pipeline, Request, SamplingParams
from qwen2vl_trt.building import quantized_model
from qwen2vl_trt.building.folder import build_planned
from qwen2vl_trt.building.plan import BuildRequest, plan_build
from qwen2vl_trt.building.quantized_model import quantize_first
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.commands import build_main, call
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.errors import CompareError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.backends.steps import Chunk
from tests.support.adapters import ATTENTION, MLP, factors, merged_by_hand, modules, weights, write_adapter
from tests.support.bounds import FP32, FP32_BEHIND_BOTH
from tests.support.engine_folders import PROFILE, write_checkpoint
from tests.support.models import edit_checkpoint, relative_error
from tests.support.requests import picture

LIMITS = PROFILE.as_dict()
DIGITS = Path(__file__).parents[2] / "docs" / "digits.png"


def transformers(folder):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, tied, by the published names; in FP32, or single ones would round to another BF16 number."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "random")
    edit_checkpoint(folder, lambda tensors: {name: tensor.float() for name, tensor in tensors.items()})
    return folder


@pytest.fixture(scope="module", params=["all layers, rslora", "patterns and a merger of its own"])
def adapted(request, checkpoint, tmp_path_factory):
    """An adapter's folder, and Transformers' model with it."""
    model = transformers(checkpoint)
    folder = tmp_path_factory.mktemp("adapter") / "digits"
    if request.param == "all layers, rslora":
        names = modules(model, *ATTENTION, *MLP, "qkv", "attn.proj", "mlp.0", "mlp.2", "patch_embed.proj")
        tensors, scale = factors(model, names), 1.5
        write_adapter(
            folder, tensors, "published", lora_alpha=3, use_rslora=True, target_modules=r".*(proj|qkv|mlp\.[02])"
        )
    else:
        names = modules(model, "q_proj", "down_proj")
        ranks = {name: 7 if name.endswith("q_proj") else 2 for name in names}
        tensors, scale = factors(model, names, ranks=ranks), 1.0
        state = model.state_dict()
        tensors |= {name: tensor * 0.9 for name, tensor in state.items() if ".merger." in name}
        config = {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 7}, "r": 2, "lora_alpha": 2}
        write_adapter(folder, tensors, target_modules=["q_proj", "down_proj"], modules_to_save=["merger"], **config)
    return folder, merged_by_hand(model, tensors, lambda name: scale)


@pytest.fixture(params=["torch", "onnxruntime"])
def pipeline(request, checkpoint, adapted, tmp_path):
    return Pipeline.from_pretrained(
        checkpoint, request.param, "fp32", "cpu", lora=adapted[0], engine_dir=tmp_path / "engines", **LIMITS
    )


def test_answers_are_those_of_transformers(pipeline, checkpoint, adapted):
    from transformers import AutoProcessor

    model, processor = adapted[1], AutoProcessor.from_pretrained(checkpoint)
    images = [picture(seed, 56, 28 * (seed + 2)) for seed in range(3)]  # no resize
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    requests = [Request("What?", [image]) for image in images]
    outputs = pipeline.generate(requests, SamplingParams(max_tokens=24))
    plain = transformers(checkpoint)
    for image, output, embeds, states in zip(
        images, outputs, pipeline.embed_images(images), pipeline.hidden_states(requests)
    ):
        inputs = processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, length:].tolist()
        assert output.token_ids == expected
        assert expected != plain.generate(**inputs, do_sample=False, max_new_tokens=24)[0, length:].tolist()
        found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        assert relative_error(embeds, torch.cat(list(getattr(found, "pooler_output", found)))) < FP32
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        assert relative_error(states, expected) < FP32_BEHIND_BOTH


def test_logits_are_those_of_transformers(pipeline, adapted):
    ids = list(range(30, 50))
    decoder = pipeline.engines.decoder
    found = decoder.step([Chunk(0, 0, 20)], decoder.embed(ids), torch.arange(20).expand(3, 20)).logits
    expected = adapted[1](input_ids=torch.tensor([ids])).logits[0, -1:]
    assert relative_error(found.float(), expected) < 1e-4


# When to build


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny model with an adapter of its decoder that garbles its answers; a function changes the adapter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = transformers(resolve_model("tiny").folder)

    def write(name="mine", seed=0):
        tensors = factors(model, modules(model, "v_proj"), seed=seed)
        return write_adapter(Path(name), tensors, target_modules=["v_proj"], lora_alpha=80)

    write()
    return write


def request(**given):
    return BuildRequest.of({"model": "tiny", "backend": "torch", "precision": "fp32", "lora": "mine"} | given)


def build(*options):
    build_main(["--model", "tiny", "--backend", "torch", "--precision", "fp32", *options])


def answer(pipeline):
    question = Request("What digits are in the image?", [DIGITS])
    return pipeline.generate([question], SamplingParams(max_tokens=16))[0].text


def test_a_folder_of_its_own_that_needs_no_adapter_afterwards(tiny, capsys):
    adapted = Pipeline.from_pretrained("tiny", "torch", "fp32", "cpu", lora="mine")
    folder = Path("artifacts/tiny-mine-torch-fp32")
    assert [path.name for path in Path("artifacts").iterdir()] == [folder.name]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert answer(adapted) != "92059" == answer(Pipeline.from_pretrained("tiny", "torch", "fp32", "cpu"))
    shutil.rmtree("mine")
    assert answer(Pipeline.from_engine_dir(folder, "cpu")) == answer(adapted)
    manifest = Manifest.read(folder)
    assert (manifest.model, manifest.lora.name) == ("tiny", "mine")
    assert manifest.lora.model_hash == Checkpoint(resolve_model("tiny").folder).hash != manifest.model_hash
    call("inspect", [str(folder)])
    assert re.search(rf"adapter +mine \({manifest.lora.hash[:12]}\), merged", capsys.readouterr().out)


def test_it_is_built_once_and_another_adapter_is_noticed(tiny, capsys):
    build("--lora", "mine")
    manifest = Path("artifacts/tiny-mine-torch-fp32/manifest.json")
    before = manifest.read_text()
    build("--lora", "mine")
    shutil.copytree("mine", "elsewhere/mine")
    build("--lora", "elsewhere/mine")  # its content counts, not its place
    assert capsys.readouterr().err.count("up to date") == 2
    tiny(seed=1)
    with pytest.raises(
        BuildError, match=r"holds other engines: --lora mine \(\w{12}\) there, mine \(\w{12}\) wanted\. Pass --force"
    ):
        build("--lora", "mine")
    assert manifest.read_text() == before
    build("--lora", "mine", "--force")
    assert json.loads(manifest.read_text())["lora"]["hash"] != json.loads(before)["lora"]["hash"]


def test_with_and_without_an_adapter_are_other_engines(tiny):
    build("--engine-dir", "engines", "--lora", "mine")
    with pytest.raises(BuildError, match=r"holds other engines: --lora mine \(\w{12}\) there, none wanted"):
        build("--engine-dir", "engines")
    build("--engine-dir", "engines", "--force")
    with pytest.raises(BuildError, match=r"holds other engines: --lora none there, mine \(\w{12}\) wanted"):
        build("--engine-dir", "engines", "--lora", "mine")
    with pytest.raises(BuildError, match=r"--lora says how to build, but engines runs as it was built"):
        call("eval", ["--engine-dir", "engines", "--lora", "mine"])


def test_what_does_not_fit_is_known_before_anything_is_built(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no adapter: it has no adapter_config\.json"):
        build("--lora", str(tmp_path))
    weights(Path("mine")).write_bytes(b"")
    for name in ("generate", "eval", "features", "serve", "batch", "bench"):
        inputs = {
            "generate": ["--prompt", "What?"],
            "features": ["--input", str(DIGITS), "--output", "features"],
            "batch": ["--input", str(DIGITS), "--output", "rows", "--prompt", "What?", "--task", "generate"],
        }
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
            call(name, [*inputs.get(name, []), "--model", "tiny", "--backend", "torch", "--lora", "mine"])
    assert not Path("artifacts").exists()


def test_a_build_that_fails_leaves_nothing(tiny, monkeypatch):
    def fail(self, job):
        assert Checkpoint(job.checkpoint.folder).hash != Checkpoint(resolve_model("tiny").folder).hash
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen2vl_trt.engines.backends.Backend.build", fail)
    with pytest.raises(BuildError, match="No space left"):
        build("--lora", "mine", "--engine-dir", "engines")
    assert [path.name for path in Path("engines").iterdir()] == [".lock"]


def test_compare_names_the_folder_that_is_full(tiny, monkeypatch):
    """It merges in a temporary folder; Python's error names the file that was copied, which is the checkpoint's."""
    pytest.importorskip("polygraphy", reason="the compare extra is not installed")
    build("--lora", "mine", "--engine-dir", "engines")
    Path("full").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(Path("full").resolve()))

    def fail(source, target):
        raise OSError(28, "No space left on device", source, None, target)

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(CompareError, match=r"/full/\w+/merged: No space left on device; TMPDIR names another place"):
        call("compare", ["--engine-dir", "engines", "--model", "tiny", "--lora", "mine"])
    assert not any(Path("full").iterdir())


# FP8


class TestFP8:
    @pytest.fixture
    def plan(self, tiny):
        pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
        return lambda **given: plan_build(request(precision="fp8", calibration_size=2, **given))

    def test_the_merged_model_is_quantised(self, plan, monkeypatch):
        made = quantize_first(plan()).model.folder
        assert made == Path("artifacts/tiny-mine-fp8")
        assert [path.name for path in Path("artifacts").iterdir() if path.is_dir()] == [made.name]
        name = "model.language_model.layers.1.self_attn.v_proj"
        checkpoint, tensors = Checkpoint(made), factors_of(Path("mine"), name)
        names = {each.replace("model.layers", "model.language_model.layers"): each for each in checkpoint.names}
        weight, scale = (checkpoint.load(names[f"{name}.{leaf}"]).float() for leaf in ("weight", "weight_scale"))
        plain = Checkpoint(resolve_model("tiny").folder).load("model.layers.1.self_attn.v_proj.weight").float()
        merged = plain + 20 * tensors[1] @ tensors[0]
        assert relative_error(weight * scale, merged) < 2**-4  # E4M3 has 3 bits
        assert relative_error(plain, merged) > 0.3

    def test_it_is_found_again_and_another_adapter_is_noticed(self, plan, tiny, fp8_checkpoint, monkeypatch):
        calls = []

        def quantize(checkpoint, folder, *others):
            calls.append(checkpoint.hash)
            shutil.copytree(fp8_checkpoint, folder)
            return Checkpoint(folder)

        monkeypatch.setattr(quantized_model, "quantize_checkpoint", quantize)
        first = quantize_first(plan())
        assert quantize_first(plan()) == first
        tiny(seed=1)
        with pytest.raises(BuildError, match=r"was quantised from another adapter \(--lora\); pass --force"):
            quantize_first(plan())
        quantize_first(plan(force=True))
        plain = Checkpoint(resolve_model("tiny").folder).hash
        assert len({plain, *calls}) == 3

    def test_compare_takes_the_model_and_its_adapter(self, plan, tiny, fp8_checkpoint, monkeypatch, capfd):
        """The reference has the merged weights in BF16: against the plain model FP8 would be far off."""
        pytest.importorskip("polygraphy", reason="the compare extra is not installed")
        options = ["--model", "tiny", "--backend", "torch", "--precision", "fp8", "--calibration-size", "32"]
        build_main([*options, "--lora", "mine", "--engine-dir", "engines"])
        asked = ["--engine-dir", "engines", "--image", str(DIGITS), "--prompt", "What?", "--max-tokens", "2"]
        for given, said in (
            (["--lora", "mine"], r"--lora goes with --model"),
            (["--model", "tiny"], r"engines has the adapter mine \(\w{12}\) merged; name the same with --lora"),
        ):
            with pytest.raises(CompareError, match=said):
                call("compare", [*asked, *given])
        # A random adapter leaves logits that FP8 alone moves to a cosine of 0.993 or 0.959, by the CPU's instructions.
        loose = ["--tolerance", "baseline=none", "decoder_cosine=0.9"]
        call("compare", [*asked, "--model", "tiny", "--lora", "mine", "--json", *loose])
        assert json.loads(capfd.readouterr().out)["departures"] == {}


def factors_of(folder, name):
    from safetensors.torch import load_file

    tensors = load_file(weights(folder))
    return [tensors[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB"]


def test_weights_of_8_bits_are_those_of_the_merged_model(tiny):
    """The build does not merge the adapter again."""
    plan = plan_build(request(precision="int8"))
    assert build_planned(plan)
    made = Checkpoint(Path("artifacts/tiny-mine-int8"))
    tensors = factors_of(Path("mine"), "model.language_model.layers.1.self_attn.v_proj")
    name = "model.layers.1.self_attn.v_proj.weight"
    plain = Checkpoint(resolve_model("tiny").folder).load(name).float()
    assert relative_error(made.load(name).float(), plain + 20 * tensors[1] @ tensors[0]) < 2**-7
    assert Manifest.read(plan.folder).model_hash == made.hash
    assert not build_planned(plan)
