"""Quantisation by Model Optimizer: the checkpoint that it writes, and that ours computes what its own model does."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qwen2vl_trt.building.calibration import Calibration, training_data
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.errors import BuildError, CheckpointError, MissingDependencyError
from qwen2vl_trt.export.model_optimizer import CalibrationSample, arguments_of
from qwen2vl_trt.export.quantize import fp8_config, quantize_checkpoint
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.quantization import fp8_layers, use_fp8
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import window_layout
from tests.qwen2vl_trt.test_quantization import linear_layers
from tests.support.bounds import E4M3_NOISE
from tests.support.models import pack_windows

pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
GRIDS = ((1, 6, 10), (1, 12, 8))


def tiny():
    return Checkpoint(resolve_model("tiny").folder)


class TestTheCheckpoint:
    def test_every_linear_layer_of_both_towers_and_nothing_else(self, fp8_checkpoint):
        checkpoint = Checkpoint(fp8_checkpoint)
        assert fp8_layers(checkpoint) == linear_layers(checkpoint.config)
        assert {name for name in checkpoint.names if "scale" not in name} | {"lm_head.weight"} == {
            *tiny().names,
            "lm_head.weight",
        }, "names of the published checkpoints"
        for name in checkpoint.names:
            if name.rpartition(".")[0] not in linear_layers(checkpoint.config):
                assert torch.equal(checkpoint.load(name), tiny().load(name)), name

    def test_what_is_said_of_it(self, fp8_checkpoint):
        """As vLLM and TensorRT-LLM read it: every linear layer that is not FP8 must be named."""
        said = json.loads((fp8_checkpoint / "hf_quant_config.json").read_text())["quantization"]
        assert (said["quant_algo"], said["kv_cache_quant_algo"]) == ("FP8", None)
        assert set(said["exclude_modules"]) >= {"lm_head", "visual.merger*", "visual.patch_embed*"}
        config = json.loads((fp8_checkpoint / "config.json").read_text())
        assert config.pop("quantization_config")["ignore"] == said["exclude_modules"]
        assert config == json.loads((tiny().folder / "config.json").read_text())

    def test_the_models_own_files(self, fp8_checkpoint):
        for path in tiny().companions:
            if path.name != "config.json":
                assert (fp8_checkpoint / path.name).read_bytes() == path.read_bytes()

    def test_layers_of_one_input_share_its_scale(self, fp8_checkpoint):
        checkpoint = Checkpoint(fp8_checkpoint)
        for i in range(checkpoint.config.text.num_hidden_layers):
            for names in ([f"self_attn.{x}_proj" for x in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]):
                assert len({float(checkpoint.load(f"model.layers.{i}.{name}.input_scale")) for name in names}) == 1

    def test_weights_are_the_nearest_multiples_of_their_scale(self, fp8_checkpoint):
        checkpoint, exact = Checkpoint(fp8_checkpoint), tiny()
        for layer in fp8_layers(checkpoint):
            weight, scale = checkpoint.load(f"{layer}.weight").float(), checkpoint.load(f"{layer}.weight_scale")
            original = exact.load(f"{layer}.weight").float()
            assert ((weight * scale - original).abs() <= original.abs() / 16 + scale * 2**-9).all(), layer


def model_optimizers_own(samples):
    """Its fake-quantised model, calibrated in BF16 as ours, computing in FP32."""
    import modelopt.torch.quantization as mtq
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny().folder, dtype=torch.bfloat16).eval()

    def calibrate(model):
        for sample in samples:
            model(**arguments_of(sample, "cpu"), use_cache=False)

    with torch.no_grad():
        mtq.quantize(model, fp8_config(), calibrate)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def layer_of(model, name):
    """A layer of Transformers' model, by its published name."""
    name = name.replace("visual.", "model.visual.").replace("model.layers.", "model.language_model.layers.")
    return model.get_submodule(name)


def take_weights(model, checkpoint):
    """Give Model Optimizer's model the weights of the checkpoint that Model Optimizer wrote."""
    for layer in fp8_layers(checkpoint):
        module = layer_of(model, layer)
        module.weight.data = checkpoint.load(f"{layer}.weight").float() * checkpoint.load(f"{layer}.weight_scale")
        module.weight_quantizer.disable()


def errors(ours, reference, sample):
    """Relative error of image embeddings and of hidden states."""
    tower, decoder, config = ours
    layout = window_layout(tuple(sample.image_grids), config.vision)
    found = tower(
        pack_windows(sample.images, sample.image_grids, reference.config),
        *layout.index_tensors.values(),
    )
    pairs = [(found, reference.model.visual(sample.images, torch.tensor(sample.image_grids)).pooler_output)]
    positions = sample.position_ids[:, None]
    embeds = torch.randn(1, positions.shape[-1], config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = reference.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    pairs.append((decoder.model(embeds, positions)[0], expected.last_hidden_state))
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@contextmanager
def layers_compared(ours, reference, layers):
    """The relative error of each of our layers, given what goes into the reference's, while that runs."""
    tower, decoder, _ = ours
    found, hooks = {}, []

    def compare(name, layer):
        def hook(module, inputs, output):
            found[name] = float((layer(inputs[0]) - output).norm() / output.norm())

        hooks.append(layer_of(reference, name).register_forward_hook(hook))

    for name in layers:
        vision = name.startswith("visual.")
        compare(name, (tower if vision else decoder).get_submodule(name.removeprefix("visual.")))
    yield found
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_it_computes_what_model_optimizers_own_model_does(tmp_path):
    """Layer by layer over the weights as written; as a whole no further off than E4M3 itself.

    A number that lies between two E4M3 numbers rounds to the other one if it differs in its last bit, as FP32 sums in
    another order do: a step of up to an eighth, which shifts the sums of the next layer, where more numbers round
    otherwise. So whole models agree within E4M3's steps only, by CPU: measured 4e-3 and from 3e-7 to 1e-4. A layer
    that is given the same input differs by the few numbers on such a tie (x / scale and x * (1 / scale)), each 1/8 of
    one of at least 64 summands in one token; 1/8 / sqrt(64) / sqrt(tokens) is below 5e-3. Over the weights before they
    were written as a whole: 1e-2 and 1e-1. Model Optimizer divides a weight by its scale in BF16 when it writes a
    checkpoint: near a tie, another E4M3 number.
    """
    checkpoint = tiny()
    samples = list(Calibration(checkpoint, training_data(8)))
    sample = max((s for s in samples if s.images is not None), key=lambda s: len(s.images))
    quantized = quantize_checkpoint(checkpoint, tmp_path / "fp8", samples)
    layers, config = fp8_layers(quantized), checkpoint.config
    tower, decoder = (
        use_fp8(VisionTransformer(config.vision), "visual.", layers),
        use_fp8(Decoder(config.text), "", layers),
    )
    load_weights(tower, quantized, "visual.", torch.float32)
    load_weights(decoder, quantized, "", torch.float32)

    reference = model_optimizers_own(samples)
    ours = tower, decoder, config
    before = errors(ours, reference, sample)
    take_weights(reference, quantized)
    with layers_compared(ours, reference, layers) as of_layers:
        after = errors(ours, reference, sample)
    assert max(before + after) < E4M3_NOISE, (before, after)
    assert of_layers.keys() == set(layers)
    assert max(of_layers.values()) < 5e-3, of_layers


class TestWhatGoesWrong:
    def test_not_installed(self, monkeypatch, tmp_path):
        monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"pip install -e '.*\[quantize\]'"):
            quantize_checkpoint(tiny(), tmp_path / "fp8", [])

    def test_samples_without_images_leave_the_tower_without_scales(self, tmp_path):
        text = CalibrationSample(torch.arange(5, 12), torch.arange(7).expand(3, 7), None, (), None, ())
        with pytest.raises((CheckpointError, BuildError), match=r"visual\.blocks\.0"):
            quantize_checkpoint(tiny(), tmp_path / "fp8", [text])

    def test_a_failure_inside_model_optimizer(self, tmp_path):
        wrong = CalibrationSample(
            torch.arange(5, 12), torch.arange(7).expand(3, 7), torch.ones(8, 3), ((1, 2, 4),), None, ()
        )
        with pytest.raises(BuildError, match=r"Model Optimizer .* cannot quantise .*checkpoint: "):
            quantize_checkpoint(tiny(), tmp_path / "fp8", [wrong])

    def test_a_full_disk(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("qwen2vl_trt.export.quantize.calibrated_model", full)
        with pytest.raises(BuildError, match=r"fp8: No space left on device; nothing that loads was left there"):
            quantize_checkpoint(tiny(), tmp_path / "fp8", [])


def test_a_torchvision_of_another_torch_is_no_hindrance():
    """In a process of its own, where ``tests/conftest.py`` has not declared its operators."""
    code = (
        "from qwen2vl_trt.export.importable_torchvision import allow_torchvision\n"
        "allow_torchvision()\n"
        "from transformers import Qwen2_5_VLForConditionalGeneration\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_nothing_on_stdout(tmp_path, capfd, fp8_checkpoint):
    capfd.readouterr()
    quantize_checkpoint(tiny(), tmp_path / "fp8", list(Calibration(tiny(), training_data(8)))[:2])
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(tmp_path)
