"""The torch backend: the project's own PyTorch modules, on CPU and CUDA.

:class:`TorchVision` and :class:`TorchDecoder` run them as they are. On a GPU :class:`CudaVision` and
:class:`CudaDecoder` leave out padding and use fused kernels and CUDA graphs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.decoder import Decoder, SlotMapping
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.fused_modules import fuse_decoder, fuse_vision
from qwen2vl_trt.quantization import fp8_layers, use_fp8
from qwen2vl_trt.transfer import to_device
from qwen2vl_trt.varlen import has_cache_attention, has_packed_attention
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import PackedSequences, WindowLayout, unpad, window_layout

from . import onednn
from .common import KVCache, TokenEmbedding, cached_layouts, graph_batches, graph_lengths
from .runners import Engines, Step, run_steps
from .torch_decode_graphs import Capture, Chunk, ChunkCache, DecodeGraphs, GraphCapture


def default_device() -> str:
    """A GPU if torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_vision(engines: Engines) -> TorchVision:
    kind = CudaVision if engines.device.type == "cuda" else TorchVision
    return kind(engines.checkpoint, engines.dtype, engines.device)


def load_decoder(engines: Engines) -> TorchDecoder:
    kind = CudaDecoder if engines.device.type == "cuda" else TorchDecoder
    return kind(engines.checkpoint, engines.manifest.profile, engines.precision.decoder, engines.device)


_MIN_PADDING = 0.05
"""Share of empty slots from which a CPU is faster without padding."""

_COMPILE_TOKENS = 256
"""Length of the prompt that functions are compiled with."""


class TorchVision:
    """See :class:`qwen2vl_trt.runtime.backends.runners.VisionRunner`."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            self.module = VisionTransformer(checkpoint.config.vision).eval()
            use_fp8(self.module, "visual.", fp8_layers(checkpoint))
        load_weights(self.module, checkpoint, "visual.", dtype, device)
        self.module.inv_freq = self.module.inv_freq.to(device)
        self.device = device
        self._optimize(dtype)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        if self.device.type == "cpu" and _padding(layout) > _MIN_PADDING:
            unpadded = unpad(layout, self.module.config)
            patches = pixel_values.flatten(0, 1)[unpadded.filled][None]
            return self.module.encode(
                patches, unpadded.position_ids, unpadded.windows, unpadded.frames, unpadded.merge_index
            )
        return self.module(pixel_values, *(to_device(index, self.device) for index in layout.index_tensors.values()))

    def _optimize(self, dtype: torch.dtype) -> None:
        _pack_weights(self.module, dtype, self.device)


class CudaVision(TorchVision):
    """Runs over patches without padding where the fused kernels exist (:mod:`qwen2vl_trt.varlen`), else over windows.

    Patches in window order are contiguous for windows and for whole images alike, so nothing is gathered.

    Args:
        checkpoint: has the weights.
        dtype: of activations.
        device: a GPU.
        compiled: compile pointwise operations (:mod:`qwen2vl_trt.fused_ops`), which takes seconds.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, compiled: bool = True) -> None:
        super().__init__(checkpoint, dtype, device)
        config = self.module.config
        self._packs = has_packed_attention(device, dtype, config.num_heads, config.head_dim)
        indices = _packed_indices if self._packs else _padded_indices
        self._indices = cached_layouts(partial(indices, config=config, device=device))
        if compiled:
            side = 8 * config.spatial_merge_size
            layout = window_layout(((1, side, side),), config)
            pixel_values = _random((*layout.sequence_position.shape, config.qwen2_vl_dim), dtype, device)
            self._ops.compile([lambda: self(pixel_values, layout)])

    @torch.inference_mode(False)  # in the caller's inference mode, compiled functions would be compiled again
    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        if not self._packs:
            return self.module(pixel_values, *self._indices(layout))
        filled, *indices = self._indices(layout)
        patches = pixel_values.flatten(0, 1)
        return self.module.encode((patches if filled is None else patches[filled])[None], *indices)

    def _optimize(self, dtype: torch.dtype) -> None:
        self.module, self._ops = fuse_vision(self.module, dtype)
        _free_memory(self.device)


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
        self.slots = profile.max_num_seqs
        self.device = device
        self._optimize(dtype)
        self.cache = KVCache(
            checkpoint.config.text, self.slots, profile.max_seq_len, dtype, device, fixed=self.fixed_cache
        )

    @torch.no_grad()
    def step(
        self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], hidden: bool = False
    ) -> Step:
        batch, length, _ = inputs_embeds.shape
        self.cache.reserve(max(starts) + length)
        start = to_device(torch.tensor(starts), self.device)
        output = self.module(
            inputs_embeds,
            to_device(position_ids, self.device),
            start,
            start + length,
            torch.full((batch,), length - 1, device=self.device),
            *self.cache.rows(first_slot, batch),
        )
        return Step(output.logits, output.hidden_states if hidden else None)

    def reset(self) -> None:
        self.cache.reset()

    def warm_up(self, chunk: int, longest: int) -> None:
        """Runs the smallest and the largest batch; there are no graphs to capture."""
        run_steps(self, chunk, {1, self.slots})

    def _optimize(self, dtype: torch.dtype) -> None:
        _pack_weights(self.module, dtype, self.device)


class CudaDecoder(TorchDecoder):
    """Reads only the keys that exist in a prompt chunk, and decodes under CUDA graphs; the cache is never reallocated.

    Args:
        checkpoint: has the weights.
        profile: limits, which are the cache's size.
        dtype: of activations and cache.
        device: a GPU.
        cuda_graphs: decode under CUDA graphs.
        capture: captures a graph; by default :class:`GraphCapture`.
        compiled: compile pointwise operations (:mod:`qwen2vl_trt.fused_ops`), which takes seconds.
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
        self._slot_lengths = [0] * self.slots
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
        self._slot_lengths[first_slot : first_slot + batch] = [start + length for start in starts]
        step = None
        if length == 1:
            step = self._graphs.step(first_slot, inputs_embeds, position_ids, starts, self._slot_lengths)
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
        hidden_states, _ = self.module.model(inputs_embeds, to_device(position_ids, self.device), caches)
        logits = self.module.lm_head(hidden_states[:, -1]).float()
        return Step(logits, hidden_states, logits.argmax(-1))

    def reset(self) -> None:
        """The cache stays allocated: graphs hold its address."""
        self._slot_lengths = [0] * self.slots

    def warm_up(self, chunk: int, longest: int) -> None:
        """Captures the graphs of all batch sizes and lengths."""
        run_steps(self, chunk, graph_batches(self.slots), graph_lengths(longest, self.cache.capacity))

    def _compile(self, dtype: torch.dtype) -> None:
        width = self.module.config.hidden_size

        def run(tokens: int) -> None:
            embeds = _random((1, tokens, width), dtype, self.device)
            self._chunk(0, embeds, torch.arange(tokens).expand(3, 1, -1), 0)

        tokens = min(_COMPILE_TOKENS, self.cache.capacity)
        self._ops.compile([partial(run, 1), partial(run, tokens)])
        for cache in (*self.cache.k, *self.cache.v):
            cache[0, :, :tokens] = 0

    def _optimize(self, dtype: torch.dtype) -> None:
        self._ops = fuse_decoder(self.module, dtype)
        _free_memory(self.device)


def _padded_indices(layout: WindowLayout, config: VisionConfig, device: torch.device) -> tuple:
    """The tower's index tensors, on the device."""
    return tuple(to_device(index, device) for index in layout.index_tensors.values())


def _packed_indices(layout: WindowLayout, config: VisionConfig, device: torch.device) -> tuple:
    """Of :func:`~qwen2vl_trt.windows.unpad`, on the device: filled slots (None if all are), then ``encode``'s."""
    unpadded = unpad(layout, config)
    windows, frames = (
        PackedSequences(to_device(sequences.cu_seqlens, device), sequences.max_seqlen)
        for sequences in (PackedSequences.of(layout.window_lengths), PackedSequences.of(layout.sequence_lengths))
    )
    filled = to_device(unpadded.filled, device) if _padding(layout) else None
    position_ids, merge_index = (to_device(index, device) for index in (unpadded.position_ids, unpadded.merge_index))
    return filled, position_ids, windows, frames, merge_index


def _padding(layout: WindowLayout) -> float:
    """Share of slots without a patch."""
    return 1 - int(layout.window_lengths.sum()) / layout.sequence_position.numel()


def _pack_weights(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and onednn.available(dtype):
        onednn.pack(module, dtype)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _free_memory(device: torch.device) -> None:
    """Release the fragments that joining weights left in PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
