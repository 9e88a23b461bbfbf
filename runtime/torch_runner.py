"""The torch backend: the project's own modules, eager. The reference and the fallback, on CPU and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.profile import BuildProfile
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.quantization import fp8_layers, use_fp8
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import WindowLayout, unpad

from . import onednn
from .kv_cache import KVCache
from .runners import Engines, Step
from .token_embedding import TokenEmbedding


def default_device() -> str:
    """A GPU where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_vision(engines: Engines) -> TorchVision:
    """Load the vision tower."""
    return TorchVision(engines.checkpoint, engines.dtype, engines.device)


def load_decoder(engines: Engines) -> TorchDecoder:
    """Load the decoder."""
    return TorchDecoder(engines.checkpoint, engines.manifest.profile, engines.precision.decoder, engines.device)


_WORTH_UNPADDING = 0.05
"""Share of empty slots from which a CPU gains by leaving them out of the linear layers and gathering instead."""


class TorchVision:
    """See :class:`runtime.runners.VisionRunner`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            self.module = VisionTransformer(checkpoint.config.vision).eval()
            use_fp8(self.module, "visual.", fp8_layers(checkpoint))
        load_weights(self.module, checkpoint, "visual.", dtype, device)
        _speed_up(self.module, dtype, device)
        self.module.inv_freq = self.module.inv_freq.to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        if self.device.type == "cpu" and _empty_share(layout) > _WORTH_UNPADDING:
            unpadded = unpad(layout, self.module.config)
            patches = pixel_values.flatten(0, 1)[unpadded.filled][None]
            return self.module.encode(
                patches, unpadded.position_ids, unpadded.windows, unpadded.frames, unpadded.merge_index
            )
        return self.module(
            pixel_values,
            *(
                index.to(self.device)
                for index in (
                    layout.window_lengths,
                    layout.position_ids,
                    layout.sequence_index,
                    layout.sequence_lengths,
                    layout.sequence_position,
                    layout.merge_index,
                )
            ),
        )


class TorchDecoder:
    """See :class:`runtime.runners.DecoderRunner`."""

    def __init__(self, checkpoint: Checkpoint, profile: BuildProfile, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            self.module = Decoder(checkpoint.config.text).eval()
            use_fp8(self.module, "", fp8_layers(checkpoint))
        load_weights(self.module, checkpoint, "", dtype, device)
        del self.module.model.embed_tokens  # looked up by TokenEmbedding
        _speed_up(self.module, dtype, device)
        self.embed = TokenEmbedding(checkpoint, dtype, device)
        self.module.model.inv_freq = self.module.model.inv_freq.to(device)
        self.slots = profile.max_batch_size
        self.device = device
        self.cache = KVCache(checkpoint.config.text, self.slots, profile.max_seq_len, dtype, device)

    @torch.no_grad()
    def step(
        self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], hidden: bool = False
    ) -> Step:
        batch, length, _ = inputs_embeds.shape
        self.cache.reserve(max(starts) + length)
        start = torch.tensor(starts, device=self.device)
        output = self.module(
            inputs_embeds,
            position_ids.to(self.device),
            start,
            start + length,
            torch.full((batch,), length - 1, device=self.device),
            *self.cache.rows(first_slot, batch),
        )
        return Step(output.logits, output.hidden_states if hidden else None)

    def reset(self) -> None:
        self.cache.reset()


def _empty_share(layout: WindowLayout) -> float:
    return 1 - int(layout.window_lengths.sum()) / layout.sequence_position.numel()


def _speed_up(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    # FP16 stays plain: oneDNN packs it on the newest CPUs alone.
    if device.type == "cpu" and dtype != torch.float16 and onednn.available():
        onednn.pack(module, dtype)
