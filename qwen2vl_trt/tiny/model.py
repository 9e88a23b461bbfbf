"""The tiny model: its shape, its training form, and how it is written as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.files import atomic_file, atomic_write
from qwen2vl_trt.vision import VisionTransformer

from .batching import Batch, Patches
from .tokenizer import END_OF_TEXT, IM_END, IMAGE_MEAN, IMAGE_STD, padded_vocab_size, special_id


def config_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of ``config.json``, in the layout of the published Qwen2.5-VL checkpoints."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "vocab_size": padded_vocab_size(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "max_window_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": special_id(tokenizer, END_OF_TEXT),
        "eos_token_id": special_id(tokenizer, IM_END),
        "vision_start_token_id": special_id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": special_id(tokenizer, "<|vision_end|>"),
        "vision_token_id": special_id(tokenizer, "<|vision_pad|>"),
        "image_token_id": special_id(tokenizer, "<|image_pad|>"),
        "video_token_id": special_id(tokenizer, "<|video_pad|>"),
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
    }


class TinyModel(nn.Module):
    """Vision tower and decoder joined for training: whole rows, no cache."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision)
        self.decoder = Decoder(config.text)
        self._initialise()
        self.pixels_per_channel = config.vision.qwen2_vl_dim // config.vision.in_chans
        self.mean = torch.tensor(IMAGE_MEAN)[:, None] * 255
        self.scale = 1 / (torch.tensor(IMAGE_STD)[:, None] * 255)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)
            elif isinstance(module, nn.Linear) and "lm_head" not in name:
                # What a block adds to the residual stream starts small.
                residual = name.endswith(("o_proj", "attn.proj", "down_proj"))
                nn.init.normal_(module.weight, std=(0.3 if residual else 0.8) * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[n, V]`` at the places of a batch where an answer token is predicted."""
        table = self.decoder.model.embed_tokens
        x = table(batch.token_ids)  # [B, S, C]
        if batch.patches is not None:
            x = x.flatten(0, 1).index_copy(0, batch.vision_index, self.embed(batch.patches)).view_as(x)
        hidden, _ = self.decoder.model(x, batch.position_ids)
        logits: Tensor = self.decoder.lm_head(hidden.flatten(0, 1)[batch.predict_index])
        return logits.float()

    def embed(self, patches: Patches) -> Tensor:
        """Vision tokens ``[T, C]``."""
        dtype = self.visual.patch_embed.proj.weight.dtype
        pixels = (patches.pixels.view(-1, 3, self.pixels_per_channel) - self.mean) * self.scale
        pixels = pixels.view(1, -1, self.config.vision.qwen2_vl_dim).to(dtype)
        layout = patches.layout
        return self.visual.encode(pixels, layout.position_ids, layout.windows, layout.frames, layout.merge_index)


def checkpoint_tensors(model: TinyModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under the published names; ``lm_head.weight`` is left out because it is tied."""
    vision = model.config.vision
    tensors: dict[str, Tensor] = {f"visual.{name}": tensor for name, tensor in model.visual.named_parameters()}
    tensors |= dict(model.decoder.model.named_parameters(prefix="model"))
    kernel = (vision.hidden_size, vision.in_chans, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    name = "visual.patch_embed.proj.weight"  # a 3-D convolution in the checkpoint
    tensors[name] = tensors[name].view(kernel)
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}


def save_checkpoint(model: TinyModel, config: dict[str, Any], folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (BF16); each appears whole or not at all."""
    with atomic_file(folder / "model.safetensors") as temporary:
        save_file(checkpoint_tensors(model, torch.bfloat16), temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it readable by its owner alone
    atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
