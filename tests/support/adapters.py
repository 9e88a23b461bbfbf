"""LoRA adapters as PEFT writes them, with random weights, for models of Transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.models import published_names

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def modules(model, *ends):
    """Names of a model's modules with these last parts."""
    return [name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{end}") for end in ends)]


def factors(model, names, rank=4, ranks=None, seed=0):
    """``lora_A`` and ``lora_B`` of modules, large enough to change every answer; a convolution's have its kernel.

    Args:
        ranks: of single modules, by name.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in names:
        out, *rest = model.get_submodule(name).weight.shape
        own = (ranks or {}).get(name, rank)
        width = torch.Size(rest).numel()
        tensors[f"{name}.lora_A.weight"] = torch.randn(own, *rest, generator=generator) / width**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, own, *[1] * (len(rest) - 1), generator=generator) * 0.3
    return tensors


def merged_by_hand(model, tensors, scale, dtype=torch.float32):
    """Add ``scale(name) * B @ A``, or put other tensors in their place, in FP64 and by Transformers' names."""
    state = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, _, part = key.partition(".lora_")
            if not part:
                state[key].copy_(tensor.to(dtype))
            elif part == "A.weight":
                up, weight = tensors[f"{name}.lora_B.weight"].double(), state[f"{name}.weight"]
                delta = scale(name) * up.flatten(1) @ tensor.double().flatten(1)
                weight.copy_((weight.double() + delta.view(weight.shape)).to(dtype))
    return model


def write_adapter(folder: Path, tensors, dialect="new", prefix="base_model.model.", **config):
    """Write an adapter's folder and return it; ``dialect`` as of ``save_model``, which ``config`` has to follow."""
    folder.mkdir(parents=True, exist_ok=True)
    if dialect == "published":
        tensors = published_names(tensors)
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}, weights(folder))
    # As PEFT 0.21 writes it, with what is only for training.
    usual = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(usual | config))
    return folder


def weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"
