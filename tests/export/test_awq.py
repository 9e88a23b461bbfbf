"""AWQ: the search is Model Optimizer's; what it finds goes into norms and weights without changing the model."""

import pytest
import torch

from qwen2vl_trt.building.calibration import Calibration, training_data
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.errors import MissingDependencyError
from qwen2vl_trt.export.awq import PASSES, awq_factors, folded
from qwen2vl_trt.export.weight_only import decoder_linears, quantize_weights
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.weights import checkpoint_names, load_weights
from tests.support.bounds import FP32
from tests.support.models import relative_error


def smoothed_layers(checkpoint):
    return [layer for layer in decoder_linears(checkpoint) if not layer.endswith("o_proj")]


def random_factors(checkpoint, spread=2.0):
    """Between ``1 / spread`` and ``spread``."""
    generator, names = torch.Generator().manual_seed(0), checkpoint_names(checkpoint)
    widths = {layer: checkpoint.entry(names[f"{layer}.weight"]).shape[1] for layer in smoothed_layers(checkpoint)}
    return {layer: spread ** (2 * torch.rand(width, generator=generator) - 1) for layer, width in widths.items()}


@torch.no_grad()
def changed_decoder(checkpoint, changes):
    """In FP32."""
    decoder = Decoder(checkpoint.config.text)
    load_weights(decoder, checkpoint, "", torch.float32)
    names, parameters = checkpoint_names(checkpoint), dict(decoder.named_parameters())
    for ours, change in changes.items():
        parameters[ours].copy_(change(checkpoint.load(names[ours])))
    return decoder


@torch.no_grad()
def states(decoder, width):
    embeds = torch.randn(1, 20, width, generator=torch.Generator().manual_seed(1))
    return decoder.model(embeds, torch.arange(20).expand(3, 1, 20))[0]


class TestFolded:
    def test_it_is_the_same_function(self, built_model):
        checkpoint = Checkpoint(built_model.checkpoint)
        width = checkpoint.config.text.hidden_size
        changes = folded(checkpoint, random_factors(checkpoint))
        assert len(changes) == 8 * checkpoint.config.text.num_hidden_layers, "two norms, six layers"
        found = states(changed_decoder(checkpoint, changes), width)
        expected = states(changed_decoder(checkpoint, {}), width)
        assert relative_error(found, expected) < FP32

    def test_a_norm_has_its_type_and_what_it_lost_is_in_the_weights(self, tied_model):
        checkpoint = Checkpoint(tied_model.checkpoint)
        names, changes = checkpoint_names(checkpoint), folded(checkpoint, random_factors(checkpoint))
        before = checkpoint.load(names["model.layers.0.input_layernorm.weight"])
        after = changes["model.layers.0.input_layernorm.weight"](before)
        assert after.dtype == before.dtype == torch.bfloat16
        weight = checkpoint.load(names["model.layers.0.self_attn.k_proj.weight"]).float()
        found = changes["model.layers.0.self_attn.k_proj.weight"](weight)
        assert torch.allclose(found * after.float(), weight * before.float(), rtol=1e-6)

    def test_layers_of_one_input_have_the_mean_of_their_factors(self, untied_model):
        checkpoint = Checkpoint(untied_model.checkpoint)
        factors = random_factors(checkpoint)
        changes = folded(checkpoint, factors)
        for norm, layers in (
            ("input_layernorm", [f"self_attn.{x}_proj" for x in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            name = f"model.layers.1.{norm}.weight"
            before = checkpoint.load(name)
            mean = sum(factors[f"model.layers.1.{layer}"] for layer in layers) / len(layers)
            assert torch.allclose(changes[name](before), before * mean, rtol=1e-6)

    @pytest.mark.parametrize("value", [0.0, 1e-40, 3e38])
    def test_norms_at_the_ends_of_their_type(self, untied_model, value, monkeypatch):
        """Nothing becomes infinite, and what was 0 stays 0."""
        checkpoint = Checkpoint(untied_model.checkpoint)
        load = checkpoint.load
        monkeypatch.setattr(
            checkpoint, "load", lambda name: torch.full_like(load(name), value) if "layernorm" in name else load(name)
        )
        changes = folded(checkpoint, random_factors(checkpoint, 1e3))
        for ours, change in changes.items():
            assert change(checkpoint.load(ours)).isfinite().all(), ours


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
    return Checkpoint(resolve_model("tiny").folder)


@pytest.fixture(scope="module")
def factors(tiny):
    calls = []
    found = awq_factors(tiny, Calibration(tiny, training_data(4)), on_sample=lambda: calls.append(1))
    assert len(calls) == 4 * PASSES
    return found


class TestTheSearch:
    def test_every_layer_but_o_proj(self, tiny, factors):
        assert factors.keys() == set(smoothed_layers(tiny))
        for layer, found in factors.items():
            assert found.shape == tiny.entry(f"{layer}.weight").shape[1:]
            assert found.dtype == torch.float32
            assert found.isfinite().all()
            assert (found > 0).all()

    def test_rounding_costs_less_with_them(self, tiny, factors, tmp_path):
        """On the layers' own inputs: the hidden states after rounding are nearer to those before."""
        samples = list(Calibration(tiny, training_data(20)))[4:]
        exact = changed_decoder(tiny, {})
        errors = {}
        for name, changes in (("rtn", {}), ("awq", folded(tiny, factors))):
            made = quantize_weights(tiny, tmp_path / name, "int4", changes)
            decoder = Decoder(made.config.text)
            load_weights(decoder, made, "", torch.float32)
            errors[name] = 0.0
            for sample in samples:
                with torch.no_grad():
                    embeds = exact.model.embed_tokens(sample.token_ids)[None]
                    found, expected = (each.model(embeds, sample.position_ids[:, None])[0] for each in (decoder, exact))
                errors[name] += float((found - expected).norm() / expected.norm())
        assert errors["awq"] < errors["rtn"], errors

    def test_not_installed(self, tiny, monkeypatch):
        monkeypatch.setattr("qwen2vl_trt.errors.find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"calibration needs .*\[quantize\]"):
            awq_factors(tiny, [])
