"""The torch backend: the project's own PyTorch modules, on CPU and CUDA.

:class:`TorchVision` and :class:`TorchDecoder` run them as they are. On a GPU :class:`CudaVision` and
:class:`CudaDecoder` leave out padding and use fused kernels and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import TextConfig, VisionConfig
from qwen2vl_trt.decoder import Decoder
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.fused_modules import fuse_decoder, fuse_vision
from qwen2vl_trt.lora import Factors
from qwen2vl_trt.quantization import fp8_layers, use_fp8
from qwen2vl_trt.transfer import to_device
from qwen2vl_trt.varlen import has_packed_attention, has_paged_attention
from qwen2vl_trt.vision import VisionTransformer
from qwen2vl_trt.weights import load_weights
from qwen2vl_trt.windows import PackedSequences, WindowLayout, unpad, window_layout

from . import onednn
from .common import KVCache, TokenEmbedding, cached_layouts
from .lora import add_adapters
from .paged_cache import PagedKVCache, page_bytes, pages_of
from .runners import Engines, run_steps
from .steps import Chunk, Step
from .torch_attention import SlotCache, SlotStep
from .torch_graphs import Capture, GraphCapture, PackedSteps, head
from .weight_only import round_head, weight_only


def default_device() -> str:
    """A GPU if torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_vision(engines: Engines) -> TorchVision:
    kind = CudaVision if engines.device.type == "cuda" else TorchVision
    return kind(engines.checkpoint, engines.dtype, engines.device)


def load_decoder(engines: Engines) -> TorchDecoder:
    what = engines.checkpoint, engines.manifest.profile, engines.precision.decoder, engines.device
    quantized = engines.precision.weight_only is not None
    if engines.device.type == "cuda":
        return CudaDecoder(*what, quantized=quantized)
    return TorchDecoder(*what, adapters=engines.adapters, quantized=quantized)


_MIN_PADDING = 0.05
"""Share of empty slots from which a CPU is faster without padding."""

_COMPILE_TOKENS = 256
"""Length of the prompt that functions are compiled with."""

_MEMORY_SHARE = 0.9
"""Of the GPU memory that is free once the weights are loaded: for the key-value cache. The rest is for activations."""


class TorchVision:
    """See :class:`qwen2vl_trt.runtime.backends.runners.VisionRunner`."""

    padded = False  # on a CPU, see ops.ragged_attention

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        with torch.device("meta"):
            self.module = VisionTransformer(checkpoint.config.vision).eval()
            use_fp8(self.module, "visual.", fp8_layers(checkpoint))
        self.device = device
        layout = self._layout(dtype)
        load_weights(self.module, checkpoint, "visual.", dtype, device, mapped=layout != "plain")
        self.module.inv_freq = self.module.inv_freq.to(device)
        self._optimize(dtype, layout)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        if self.device.type == "cpu" and _padding(layout) > _MIN_PADDING:
            unpadded = unpad(layout, self.module.config)
            patches = pixel_values.flatten(0, 1)[unpadded.filled][None]
            return self.module.encode(
                patches, unpadded.position_ids, unpadded.windows, unpadded.frames, unpadded.merge_index
            )
        return self.module(pixel_values, *(to_device(index, self.device) for index in layout.index_tensors.values()))

    def _layout(self, dtype: torch.dtype) -> onednn.Layout:
        return onednn.fastest(dtype, onednn.VISION_ROWS) if self.device.type == "cpu" else "plain"

    def _optimize(self, dtype: torch.dtype, layout: onednn.Layout) -> None:
        _pack_weights(self.module, dtype, layout)


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
        self.padded = not self._packs
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

    def _layout(self, dtype: torch.dtype) -> onednn.Layout:
        return "plain"

    def _optimize(self, dtype: torch.dtype, layout: onednn.Layout) -> None:
        self.module, self._ops = fuse_vision(self.module, dtype)
        _free_memory(self.device)


class TorchDecoder:
    """See :class:`qwen2vl_trt.runtime.backends.runners.DecoderRunner`.

    Args:
        checkpoint: has the weights.
        profile: limits.
        dtype: of activations and cache.
        device: a CPU or a GPU.
        adapters: by the names that chunks have.
        quantized: compute with the weights of 4 and 8 bits that the checkpoint has (:mod:`.weight_only`), and on a CPU
            with ``lm_head`` in 8 bits; otherwise they are dequantised.
    """

    packed, enqueues = True, True
    cache: KVCache

    def __init__(
        self,
        checkpoint: Checkpoint,
        profile: BuildProfile,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Mapping[str, Factors] = MappingProxyType({}),
        quantized: bool = False,
    ) -> None:
        with torch.device("meta"):
            self.module = Decoder(checkpoint.config.text).eval()
            use_fp8(self.module, "", fp8_layers(checkpoint))
        layer = partial(weight_only, device=device, dtype=dtype) if quantized else None
        self.device, self.slots = device, profile.max_num_seqs
        layout = self._layout(dtype)
        load_weights(self.module, checkpoint, "", dtype, device, layer, mapped=layout != "plain")
        table = self.module.model.embed_tokens.weight
        self.embed = TokenEmbedding(checkpoint, dtype, device, table if device.type != "cpu" else None)
        del self.module.model.embed_tokens, table
        if quantized and device.type == "cpu" and isinstance(self.module.lm_head, nn.Linear):
            self.module.lm_head = round_head(self.module.lm_head, dtype) or self.module.lm_head  # type: ignore[assignment]
        self.module.model.inv_freq = self.module.model.inv_freq.to(device)
        self.vocab_size = checkpoint.config.text.vocab_size
        # Before their layers are packed.
        self._adapters = add_adapters(self.module, adapters, dtype) if adapters else None
        self._optimize(dtype, layout)
        self._allocate(checkpoint.config.text, profile.max_seq_len, dtype)

    def _allocate(self, config: TextConfig, max_seq_len: int, dtype: torch.dtype) -> None:
        self.cache = KVCache(config, self.slots, max_seq_len, dtype, self.device)

    @torch.no_grad()
    def step(
        self,
        chunks: Sequence[Chunk],
        inputs_embeds: Tensor,
        position_ids: Tensor,
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        self.cache.reserve(max(chunk.end for chunk in chunks))
        step = SlotStep.of(chunks, self.device)
        caches = [SlotCache(k, v, step) for k, v in zip(self.cache.k, self.cache.v)]
        positions = to_device(position_ids, self.device)[:, None]
        with self._adapters.step(chunks) if self._adapters else nullcontext():
            hidden_states = self.module.model(inputs_embeds[None], positions, caches)[0][0]
        return Step(head(self.module, hidden_states, chunks, wanted), hidden_states if hidden else None)

    def reset(self) -> None:
        self.cache.reset()

    def warm_up(self, chunk: int, longest: int) -> None:
        """Runs the smallest and the largest batch; there are no graphs to capture."""
        run_steps(self, chunk, {1, self.slots})

    def _layout(self, dtype: torch.dtype) -> onednn.Layout:
        rows = onednn.decoder_rows(self.slots)
        return onednn.fastest(dtype, rows) if self.device.type == "cpu" else "plain"

    def _optimize(self, dtype: torch.dtype, layout: onednn.Layout) -> None:
        _pack_weights(self.module, dtype, layout)


class CudaDecoder(TorchDecoder):
    """Runs fused modules over a paged cache under CUDA graphs.

    Args:
        checkpoint: has the weights.
        profile: limits.
        dtype: of activations and cache.
        device: a GPU.
        cuda_graphs: run under CUDA graphs.
        capture: captures a graph; by default :class:`GraphCapture`.
        compiled: compile pointwise operations (:mod:`qwen2vl_trt.fused_ops`), which takes seconds.
        quantized: see :class:`TorchDecoder`.
        pages: of the cache; by default for ``slots`` sequences of ``max_seq_len`` tokens, or as many as fit the GPU.

    Raises:
        EngineError: not one sequence of ``max_seq_len`` tokens fits the GPU's memory.
    """

    cache: PagedKVCache  # type: ignore[assignment]

    def __init__(
        self,
        checkpoint: Checkpoint,
        profile: BuildProfile,
        dtype: torch.dtype,
        device: torch.device,
        cuda_graphs: bool = True,
        capture: Capture | None = None,
        compiled: bool = True,
        pages: int | None = None,
        quantized: bool = False,
    ) -> None:
        self._most_pages = pages
        super().__init__(checkpoint, profile, dtype, device, quantized=quantized)
        text = checkpoint.config.text
        fused = has_paged_attention(device, dtype, text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        capture = (capture or GraphCapture(device)) if cuda_graphs else None
        self._steps = PackedSteps(self.module, self.cache, dtype, device, capture, fused)
        if compiled:
            self._compile(dtype)

    def _allocate(self, config: TextConfig, max_seq_len: int, dtype: torch.dtype) -> None:
        each = pages_of(max_seq_len)
        pages = 1 + (self._most_pages or self.slots * each)
        if self._most_pages is None and self.device.type == "cuda":
            size = page_bytes(config, dtype)
            free = int(_MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0])
            pages = min(pages, free // size)
            if pages <= each:
                raise EngineError(
                    f"the cache of one sequence of {max_seq_len:,} tokens takes {each * size / 2**30:.1f} GiB, and the"
                    f" GPU has {free / 2**30:.1f} GiB for it. Lower --max-seq-len, or free GPU memory."
                )
        self.cache = PagedKVCache(config, self.slots, max_seq_len, pages, dtype, self.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(
        self,
        chunks: Sequence[Chunk],
        inputs_embeds: Tensor,
        position_ids: Tensor,
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        step = self._steps.step(chunks, inputs_embeds, position_ids, wanted)
        return step if hidden else step._replace(hidden_states=None)

    def reset(self) -> None:
        """The cache stays allocated: graphs hold its address."""

    def warm_up(self, chunk: int, longest: int) -> None:
        """Captures the graphs of all shapes, in the order of need."""
        for chunks in self._steps.shapes(longest, chunk):
            self.cache.block_table[:] = 0  # all write to page 0
            tokens = sum(each.length for each in chunks)
            embeds = self.embed([0]).expand(tokens, -1)
            self.step(chunks, embeds, torch.zeros(3, tokens, dtype=torch.long))

    def _compile(self, dtype: torch.dtype) -> None:
        width = self.module.config.hidden_size

        def run(tokens: int) -> None:
            embeds = _random((tokens, width), dtype, self.device)
            positions = torch.arange(tokens).expand(3, -1)
            self._steps.run_eagerly([Chunk(0, 0, tokens)], embeds, positions)

        tokens = min(_COMPILE_TOKENS, self.cache.max_seq_len)
        self.cache.allot(1, tokens)
        self._ops.compile([partial(run, 1), partial(run, tokens)])
        self.cache.clear(range(1 + pages_of(tokens)))
        self.cache.block_table[:] = 0

    def _layout(self, dtype: torch.dtype) -> onednn.Layout:
        return "plain"

    def _optimize(self, dtype: torch.dtype, layout: onednn.Layout) -> None:
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


def _pack_weights(module: nn.Module, dtype: torch.dtype, layout: onednn.Layout) -> None:
    if layout != "plain":
        onednn.pack(module, dtype, layout)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _free_memory(device: torch.device) -> None:
    """Release the fragments that joining weights left in PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
