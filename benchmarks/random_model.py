"""A checkpoint of real widths and random weights: 3B's, with 8 vision blocks and 4 decoder layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.backends import find_backend
from engines.build import build_engines
from engines.profile import BuildProfile
from export.graphs import decoder_graph, vision_graph
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.hub import ResolvedModel
from qwen2vl_trt.weights import LM_HEAD, PATCH_EMBEDDING

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128000,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_config": {
        "depth": 8,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "tokens_per_second": 2,
        "hidden_act": "silu",
        "in_chans": 3,
    },
}

PROFILE = BuildProfile(min_hw_dims=16, max_hw_dims=5184, max_batch_size=8, max_input_len=4096, max_seq_len=8192)


def write_checkpoint(folder: Path) -> None:
    """Write it in BF16, 1.6 GB: normal weights of standard deviation 0.02, norms of 1."""
    generator = torch.Generator().manual_seed(0)
    config = Qwen2VLConfig.from_dict(CONFIG)
    vision, text = config.vision, config.text
    tensors = {}
    for graph in (vision_graph(config, torch.bfloat16), decoder_graph(config, torch.bfloat16)):
        with torch.device("meta"):
            shapes = {graph.prefix + name: tensor.shape for name, tensor in graph.module().state_dict().items()}
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            norm = len(shape) == 1 and name.endswith("weight")
            tensors[name] = tensor.fill_(1) if norm else tensor.normal_(0, 0.02, generator=generator)
    if text.tie_word_embeddings:
        del tensors[LM_HEAD]
    patch = (vision.in_chans, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    tensors[PATCH_EMBEDDING] = tensors[PATCH_EMBEDDING].view(-1, *patch)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prepare(folder: Path) -> dict[str, Path]:
    """Write the checkpoint and build its engines, unless they are there.

    Returns:
        ``checkpoint`` and one folder for each backend and precision, ``torch bf16``.
    """
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        write_checkpoint(checkpoint)
    paths = {"checkpoint": checkpoint}
    for name in ("torch bf16", "torch fp32", "onnxruntime fp32"):
        backend, precision = find_backend(*name.split())
        paths[name] = folder / name.replace(" ", "-")
        build_engines(ResolvedModel("random-3B", checkpoint), backend, precision, PROFILE, paths[name])
    return paths
