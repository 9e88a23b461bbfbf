"""Random-weight Qwen2.5-VL models of Transformers, the reference of these tests, and their checkpoints on disk."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.mrope import rope_index

IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 88, 89
FIRST_SPECIAL = 86  # tokens below are text

MINIMAL_CONFIG = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 4,
    "video_token_id": 5,
    "vision_start_token_id": 2,
    "vision_end_token_id": 3,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    },
}
"""A ``config.json`` where no test looks at the model."""
SMALL_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "vision_start_token_id": 508,
    "vision_end_token_id": 509,
    "image_token_id": 510,
    "video_token_id": 511,
    "tie_word_embeddings": True,
}
"""An entry of ``qwen2vl_trt.published.SHAPES`` of a size that a test can write."""


def model_config(tied=True, text=None, vision=None, rope_theta=100.0):
    """A small configuration of Transformers; ``text`` and ``vision`` override its fields.

    A rotary base of 100 instead of the published 1e6: with heads this small a wrong position would barely show.
    """
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 96,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | (text or {})
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    time = head_dim // 8  # sections in the ratio of the published 16 : 24 : 24
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope_theta,
        "mrope_section": [time, (head_dim // 2 - time) // 2, head_dim // 2 - time - (head_dim // 2 - time) // 2],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 100,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
        | (vision or {}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )


def random_model(config, seed=0):
    """A model whose weights matter: with Transformers' own 0.02 every attention is uniform and hides an error."""
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:  # tied and large, it would make every token predict itself
                parameter.copy_(values * (0.1 if config.tie_word_embeddings else 1))
            elif parameter.ndim > 1:
                parameter.copy_(values * (1.2 / parameter[0].numel() ** 0.5))
            elif name.endswith("bias"):
                parameter.copy_(values * 0.2)
            else:  # a norm's scale
                parameter.copy_(1 + values * 0.2)
    return model.requires_grad_(False)


def in_dtype(model, dtype):
    """The model with its parameters in another type; ``model.to`` would round its rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def our_config(config) -> Qwen2VLConfig:
    """The same configuration as the library reads it."""
    return Qwen2VLConfig.from_dict(config.to_dict())


def published_names(tensors):
    """Names as in the published checkpoints, which Transformers 5 no longer writes."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }


def save_model(model, folder: Path, dtype=torch.float32, dialect="new", shards=1):
    """Write a checkpoint folder and return it.

    Args:
        dialect: of the tensors' names: ``new`` as Transformers 5 has them, ``published`` as the hub's.
        shards: number of files to spread the tensors over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if dialect == "published":
        tensors = published_names(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_checkpoint(folder: Path, change):
    """Replace the tensors of a one-file checkpoint by ``change(tensors)``."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()  # it may be a hard link
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def in_fp8(tensors, layer=lambda name: ".layers." in name or ".blocks." in name):
    """Tensors of a checkpoint with the linear layers that ``layer`` names as Model Optimizer writes them."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and layer(name):
            scale = tensor.float().abs().max() / 448
            out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            out[name.removesuffix("weight") + "weight_scale"] = scale
            out[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.02)
    return out


def in_fp8_as_shared(tensors):
    """FP8 with one scale for layers of one input, as Model Optimizer writes a decoder's."""
    out = in_fp8(tensors)
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name in [name for name in tensors if name.endswith(f"{group[0]}.weight")]:
            members = [name.replace(group[0], member) for member in group]
            scale = torch.stack([out[f"{member}_scale"] for member in members]).max()
            for member in members:
                out[member] = (tensors[member].float() / scale).to(torch.float8_e4m3fn)
                out[f"{member}_scale"] = scale.clone()
    return out


def write_quantization(folder: Path, algorithm="FP8", **fields):
    """Model Optimizer's ``hf_quant_config.json``."""
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm} | fields}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))


def random_patches(grids, config, seed=0):
    """Patches ``[sum of t * h * w, qwen2_vl_dim]`` in the order in which Transformers' processor writes them."""
    vision = our_config(config).vision
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, vision.qwen2_vl_dim, generator=torch.Generator().manual_seed(seed))


def pack_windows(patches, grids, config):
    """Patches in Transformers' order to windows ``[W, S, D]``, by Transformers' own window index."""
    vision = config.vision_config
    unit = vision.spatial_merge_size**2
    slots = (vision.window_size // vision.patch_size) ** 2
    index, bounds = get_vision_window_index(
        torch.tensor(grids), vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    ordered = patches.view(len(index), unit, -1)[index].view(len(patches), -1)
    windows = torch.zeros(len(bounds) - 1, slots, patches.shape[1], dtype=patches.dtype)
    for window, (start, end) in zip(windows, zip(bounds.tolist(), bounds[1:].tolist())):
        window[: end - start] = ordered[start:end]
    return windows


def token_type_ids(token_ids):
    """Transformers' ``mm_token_type_ids``: 0 text, 1 image, 2 video."""
    return torch.tensor([{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in token_ids])


def vision_tokens(token, grid, merge=2):
    """One image or video as the chat template writes it."""
    return [VISION_START, *[token] * (grid[0] * grid[1] * grid[2] // merge**2), VISION_END]


def prompt_positions(token_ids, config, images=(), videos=(), seconds=()):
    """Positions ``[3, 1, S]`` and the delta."""
    positions, delta = rope_index(token_ids, our_config(config), images, videos, seconds)
    return positions[:, None], delta


def relative_error(found, expected):
    """Largest difference over the largest expected value; tolerances of the tests are in it."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
