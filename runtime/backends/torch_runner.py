"""The torch backend: the project's own modules, on CPU and CUDA; the reference and the fallback.

:class:`TorchVision` and :class:`TorchDecoder` run them as they are, anywhere; a GPU gets :class:`CudaVision` and
:class:`CudaDecoder`, which waste neither arithmetic on padding nor time between kernels.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.decoder import Decoder, SlotMapping
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.fused_modules import fuse_decoder, fuse_vision
from qwen2vl_trt.quantization import fp8_layers, use_fp8
from qwen2vl_trt.varlen import has_cache_attention, has_packed_attention
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import PackedSequences, WindowLayout, unpad, window_layout

from ..sending import send
from . import onednn
from .decode_buckets import graph_lengths, graph_sizes
from .kept_layouts import keep_layouts
from .kv_cache import KVCache
from .runners import Engines, Step
from .token_embedding import TokenEmbedding
from .torch_caches import Chunk, ChunkCache
from .torch_decode_graphs import Capture, DecodeGraphs, GraphCapture
from .warm_up import run_steps


def default_device() -> str:
    """A GPU where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_vision(engines: Engines) -> TorchVision:
    """Load the vision tower."""
    kind = CudaVision if engines.device.type == "cuda" else TorchVision
    return kind(engines.checkpoint, engines.dtype, engines.device)


def load_decoder(engines: Engines) -> TorchDecoder:
    """Load the decoder."""
    kind = CudaDecoder if engines.device.type == "cuda" else TorchDecoder
    return kind(engines.checkpoint, engines.manifest.profile, engines.precision.decoder, engines.device)


_WORTH_UNPADDING = 0.05
"""Share of empty slots from which a CPU gains by leaving them out of the linear layers and gathering instead."""

_TRIED_TOKENS = 256
"""Of the prompt that compiled functions are tried on."""


class TorchVision:
    """See :class:`qwen2vl_trt.runtime.backends.runners.VisionRunner`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            self.module = VisionTransformer(checkpoint.config.vision).eval()
            use_fp8(self.module, "visual.", fp8_layers(checkpoint))
        load_weights(self.module, checkpoint, "visual.", dtype, device)
        self.module.inv_freq = self.module.inv_freq.to(device)
        self.device = device
        self._speed_up(dtype)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        if self.device.type == "cpu" and _empty_share(layout) > _WORTH_UNPADDING:
            unpadded = unpad(layout, self.module.config)
            patches = pixel_values.flatten(0, 1)[unpadded.filled][None]
            return self.module.encode(
                patches, unpadded.position_ids, unpadded.windows, unpadded.frames, unpadded.merge_index
            )
        return self.module(pixel_values, *(send(index, self.device) for index in layout.index_tensors.values()))

    def _speed_up(self, dtype: torch.dtype) -> None:
        _pack(self.module, dtype, self.device)


class CudaVision(TorchVision):
    """The tower over patches alone where the fused kernels run (:mod:`qwen2vl_trt.varlen`), over windows elsewhere.

    Patches in window order lie sequence by sequence for windows and for whole images alike, so nothing is gathered.
    Index tensors stay on the device for layouts that come again.

    Args:
        checkpoint: whose weights.
        dtype: of activations.
        device: a GPU.
        compiled: compile the steps between matrix products (:mod:`qwen2vl_trt.fused_ops`), which takes seconds.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, compiled: bool = True) -> None:
        super().__init__(checkpoint, dtype, device)
        config = self.module.config
        packs = has_packed_attention(device, dtype, config.num_heads, config.head_dim)
        self._indices = keep_layouts(partial(_sent, config=config, device=device, packs=packs))
        if compiled:
            side = 8 * config.spatial_merge_size
            layout = window_layout(((1, side, side),), config)
            pixel_values = _noise((*layout.sequence_position.shape, config.qwen2_vl_dim), dtype, device)
            self._ops.compile([lambda: self(pixel_values, layout)])

    @torch.inference_mode(False)  # compiled functions know one mode; a caller's own would compile them anew
    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        indices = self._indices(layout)
        if not isinstance(indices, _Packed):
            return self.module(pixel_values, *indices)
        patches = pixel_values.flatten(0, 1)
        if indices.filled is not None:
            patches = patches[indices.filled]
        return self.module.encode(
            patches[None], indices.position_ids, indices.windows, indices.frames, indices.merge_index
        )

    def _speed_up(self, dtype: torch.dtype) -> None:
        self.module, self._ops = fuse_vision(self.module, dtype)
        _release(self.device)


class _Packed(NamedTuple):
    """:class:`~qwen2vl_trt.windows.UnpaddedLayout` on a device; ``filled`` is None where every slot is."""

    filled: Tensor | None
    position_ids: Tensor
    windows: PackedSequences
    frames: PackedSequences
    merge_index: Tensor


class TorchDecoder:
    """See :class:`qwen2vl_trt.runtime.backends.runners.DecoderRunner`."""

    fixed_cache = False

    def __init__(self, checkpoint: Checkpoint, profile: BuildProfile, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            self.module = Decoder(checkpoint.config.text).eval()
            use_fp8(self.module, "", fp8_layers(checkpoint))
        load_weights(self.module, checkpoint, "", dtype, device)
        table = self.module.model.embed_tokens.weight
        self.embed = TokenEmbedding(checkpoint, dtype, device, table if device.type != "cpu" else None)
        del self.module.model.embed_tokens, table
        self.module.model.inv_freq = self.module.model.inv_freq.to(device)
        self.slots = profile.max_batch_size
        self.device = device
        self._speed_up(dtype)
        self.cache = KVCache(
            checkpoint.config.text, self.slots, profile.max_seq_len, dtype, device, fixed=self.fixed_cache
        )

    @torch.no_grad()
    def step(
        self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], hidden: bool = False
    ) -> Step:
        batch, length, _ = inputs_embeds.shape
        self.cache.reserve(max(starts) + length)
        start = send(torch.tensor(starts), self.device)
        output = self.module(
            inputs_embeds,
            send(position_ids, self.device),
            start,
            start + length,
            torch.full((batch,), length - 1, device=self.device),
            *self.cache.rows(first_slot, batch),
        )
        return Step(output.logits, output.hidden_states if hidden else None)

    def reset(self) -> None:
        self.cache.reset()

    def warm_up(self, chunk: int, longest: int) -> None:
        """There is no graph to capture, so a step of one row and of all will do, whatever they hold."""
        run_steps(self, chunk, {1, self.slots})

    def _speed_up(self, dtype: torch.dtype) -> None:
        _pack(self.module, dtype, self.device)


class CudaDecoder(TorchDecoder):
    """The decoder over a cache that never moves: prompts over the keys they have, new tokens under CUDA graphs.

    Args:
        checkpoint: whose weights.
        profile: its limits are the cache's size.
        dtype: of activations and cache.
        device: a GPU.
        cuda_graphs: without them, every kernel of a step is launched on its own.
        capture: what captures a graph; by default PyTorch's CUDA graphs.
        compiled: compile the steps between matrix products (:mod:`qwen2vl_trt.fused_ops`), which takes seconds.
    """

    fixed_cache = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        profile: BuildProfile,
        dtype: torch.dtype,
        device: torch.device,
        cuda_graphs: bool = True,
        capture: Capture | None = None,
        compiled: bool = True,
    ) -> None:
        super().__init__(checkpoint, profile, dtype, device)
        self._held = [0] * self.slots  # tokens in each slot
        text = checkpoint.config.text
        self._fused = has_cache_attention(
            device, dtype, text.num_attention_heads, text.num_key_value_heads, text.head_dim
        )
        capture = (capture or GraphCapture(device)) if cuda_graphs else None
        self._graphs = DecodeGraphs(self.module, self.cache, dtype, device, capture, self._fused)
        if compiled:
            self._compile(dtype)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], hidden: bool = False
    ) -> Step:
        batch, length, _ = inputs_embeds.shape
        self.cache.reserve(max(starts) + length)
        self._held[first_slot : first_slot + batch] = [start + length for start in starts]
        step = self._graphs.step(first_slot, inputs_embeds, position_ids, starts, self._held) if length == 1 else None
        if step is None and len(set(starts)) == 1:
            step = self._chunk(first_slot, inputs_embeds, position_ids, starts[0])
        if step is None:
            step = super().step(first_slot, inputs_embeds, position_ids, starts, hidden)
        return step if hidden else step._replace(hidden_states=None)

    def _chunk(self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, start: int) -> Step:
        batch, length, _ = inputs_embeds.shape
        rows = torch.arange(first_slot, first_slot + batch, device=self.device).repeat_interleave(length)
        positions = torch.arange(start, start + length, device=self.device).repeat(batch)
        chunk = Chunk(first_slot, start + length, self._fused, SlotMapping(rows, positions))
        caches = [ChunkCache(k, v, chunk) for k, v in zip(self.cache.k, self.cache.v)]
        hidden_states, _ = self.module.model(inputs_embeds, send(position_ids, self.device), caches)
        logits = self.module.lm_head(hidden_states[:, -1]).float()
        return Step(logits, hidden_states, logits.argmax(-1))

    def reset(self) -> None:
        """The cache keeps its memory: graphs have its address."""
        self._held = [0] * self.slots

    def warm_up(self, chunk: int, longest: int) -> None:
        """Captures the graph of every number of slots and of keys that there will be."""
        run_steps(self, chunk, graph_sizes(self.slots), graph_lengths(longest, self.cache.capacity))

    def _compile(self, dtype: torch.dtype) -> None:
        width = self.module.config.hidden_size

        def run(tokens: int) -> None:
            embeds = _noise((1, tokens, width), dtype, self.device)
            self._chunk(0, embeds, torch.arange(tokens).expand(3, 1, -1), 0)

        tokens = min(_TRIED_TOKENS, self.cache.capacity)
        self._ops.compile([partial(run, 1), partial(run, tokens)])
        for cache in (*self.cache.k, *self.cache.v):
            cache[0, :, :tokens] = 0

    def _speed_up(self, dtype: torch.dtype) -> None:
        self._ops = fuse_decoder(self.module, dtype)
        _release(self.device)


def _sent(
    layout: WindowLayout, config: VisionConfig, device: torch.device, packs: bool
) -> _Packed | tuple[Tensor, ...]:
    """What the tower needs to know of a layout, on the device."""
    if not packs:
        return tuple(send(index, device) for index in layout.index_tensors.values())
    unpadded = unpad(layout, config)
    windows, frames = (
        PackedSequences(send(sequences.cu_seqlens, device), sequences.max_seqlen)
        for sequences in (PackedSequences.of(layout.window_lengths), PackedSequences.of(layout.sequence_lengths))
    )
    return _Packed(
        send(unpadded.filled, device) if _empty_share(layout) else None,
        send(unpadded.position_ids, device),
        windows,
        frames,
        send(unpadded.merge_index, device),
    )


def _empty_share(layout: WindowLayout) -> float:
    return 1 - int(layout.window_lengths.sum()) / layout.sequence_position.numel()


def _pack(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and onednn.available(dtype):
        onednn.pack(module, dtype)


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _release(device: torch.device) -> None:
    """Give back what joining weights left behind: pieces that fit nothing else."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
