"""The TensorRT backends: plans of TensorRT and of TensorRT for RTX, on a GPU.

Tensors are PyTorch's, bound by address. Each cache is bound as input and output, and updated in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.options import ATTENTION_MASKS, EITHER_MASK, LENGTHS_PLAN
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.export.graphs import cache_names
from qwen2vl_trt.windows import WindowLayout

from .common import (
    KVCache,
    TokenEmbedding,
    cached_layouts,
    graph_batches,
    graph_inputs,
    graph_step,
    padded_batch,
    padded_step,
)
from .runners import Engines, run_steps
from .steps import Chunk, Step
from .tensorrt_context import ActivationMemory, ExecutionContext
from .tensorrt_engine import CudaDevice, Engine, ReportLayer, load_engine, stream_weights
from .tensorrt_tensors import check_cache, check_rows, choose_profile, token_bytes

logger = logging.getLogger(__name__)

_ALIGNMENT = 32  # int64 numbers in 256 bytes


def default_device() -> str:
    """Raises EngineError without a GPU."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"TensorRT engines run on an NVIDIA GPU, and PyTorch {torch.__version__} sees none here. Run on a machine"
            " with one (and a PyTorch built for CUDA), or build for --backend onnxruntime or torch."
        )
    return "cuda"


def load_vision(engines: Engines) -> TensorRTVision:
    """Raises as :func:`qwen2vl_trt.runtime.backends.tensorrt_engine.load_engine`."""
    return TensorRTVision(_load(engines, "vision"))


_PROBE = 9
"""Tokens of the prompt that :func:`check_lengths` reads."""

_TOLERANCE = 0.05
"""Relative, of logits: other shapes in BF16 differ by less; keys that should not be seen change all of it."""


def load_decoder(engines: Engines) -> TensorRTDecoder:
    """Raises as :func:`qwen2vl_trt.runtime.backends.tensorrt_engine.load_engine` and :func:`check_lengths`, or if the
    cache does not fit.
    """
    kind = engines.manifest.options.get("attention_mask", ATTENTION_MASKS[0])
    if kind == EITHER_MASK:
        return _load_either(engines)
    decoder = _decoder(engines)
    if kind == "lengths":
        check_lengths(decoder, engines.manifest.profile.max_input_len)
    logger.info("decoder engine: attention goes by %s", "lengths" if kind == "lengths" else "explicit masks")
    return decoder


def _decoder(engines: Engines, plan_name: str | None = None) -> TensorRTDecoder:
    return TensorRTDecoder(_load(engines, "decoder", plan_name), engines.checkpoint, engines.manifest.profile)


def _load_either(engines: Engines) -> TensorRTDecoder:
    """The decoder with lengths, if it computes what the one with masks does; they are loaded one after the other."""
    limit = engines.manifest.profile.max_input_len
    expected = _probe(_decoder(engines), limit)
    decoder: TensorRTDecoder | None = None
    try:
        decoder = _decoder(engines, LENGTHS_PLAN)
        check_lengths(decoder, limit, expected)
        logger.info("decoder engine: attention goes by lengths, which agree with explicit masks here")
        return decoder
    except EngineError as error:  # whose traceback would keep the decoder in memory
        logger.warning("decoder engine: explicit masks, so a decode step reads the whole cache. %s", str(error))
    decoder = None  # both may not fit
    return _decoder(engines)


def check_lengths(decoder: TensorRTDecoder, max_input_len: int, expected: Tensor | None = None) -> None:
    """Try on a few tokens whether attention keeps to the lengths that it is given; the cache is zero afterwards.

    TensorRT 11.1 and 11.2 are reported not to (docs/design/tensorrt.md). What lies beyond the lengths must not matter,
    in prompts and in decode steps, nor must it whether a prompt is read at once or in two chunks.

    Args:
        decoder: while it is not in use.
        max_input_len: most tokens of a prompt.
        expected: of :func:`_probe`, by a decoder with masks.

    Raises:
        EngineError: it does not.
    """
    found = _probe(decoder, max_input_len)
    expected = found if expected is None else expected
    for what, logits in (
        ("taking them in place of masks", found),
        ("what lies beyond them", _probe(decoder, max_input_len, beyond=4.0)),
        ("chunks", _probe(decoder, max_input_len, chunks=2)),
    ):
        difference = float((logits - expected).norm() / expected.norm())
        if not difference < _TOLERANCE:
            raise EngineError(
                f"decoder engine: attention does not keep to its lengths in this TensorRT on this GPU: {what} changes"
                f" logits by {difference:.3g} of their size. Rebuild with --attention-mask explicit."
            )
    for cache in (*decoder.cache.k, *decoder.cache.v):
        cache.zero_()
    decoder.reset()


def _probe(decoder: TensorRTDecoder, max_input_len: int, beyond: float = 0.0, chunks: int = 1) -> Tensor:
    """Logits ``[2, 1, V]`` of a prompt of a few tokens, read in so many chunks, and of a decode step.

    ``beyond`` is what the cache holds where nothing is written.
    """
    for cache in (*decoder.cache.k, *decoder.cache.v):
        cache.fill_(beyond)
    start, found = 0, []
    for chunk in (*torch.arange(min(_PROBE, max_input_len)).chunk(chunks), torch.zeros(1, dtype=torch.int64)):
        positions = torch.arange(start, start + len(chunk)).expand(3, -1)
        step = decoder.step([Chunk(0, start, len(chunk))], decoder.embed(chunk), positions)
        found.append(step.logits.float().clone())
        start += len(chunk)
    return torch.stack(found[-2:])


def _load(engines: Engines, name: str, plan_name: str | None = None) -> Engine:
    device = CudaDevice(engines.device, -1 if name == "decoder" else 0)  # answers under way before new images
    return load_engine(engines.folder, name, engines.manifest, engines.checkpoint.config, device, plan_name)


class _Contexts:
    """An engine's execution contexts, one for each optimisation profile; they share activation memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._memory = engine, ActivationMemory(engine.device.torch_device)
        self._contexts: dict[int, ExecutionContext] = {}

    def run(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], caches: dict[str, Tensor]) -> None:
        """Enqueue the engine; for the arguments see :meth:`ExecutionContext.prepare`.

        Raises:
            LimitError: no profile takes the inputs' shapes.
            EngineError: with TensorRT's reason.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in (inputs | caches).items()}
        profile = choose_profile(self._engine.tensors, shapes, self._engine.name)
        with self._engine.device.stream() as stream:
            if profile not in self._contexts:
                self._contexts[profile] = ExecutionContext(self._engine, profile, self._memory, stream)
            self._contexts[profile].prepare(inputs, outputs, caches)
            self._contexts[profile].enqueue(stream)

    def to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the GPU, in the engine's types, aligned."""
        device, placed = self._engine.device, {}
        with device.stream():
            for name, tensor in inputs.items():
                dtype = self._engine.tensors[name].dtype
                tensor = device.pinned(tensor).to(device.torch_device, dtype, non_blocking=True).contiguous()
                placed[name] = tensor if tensor.data_ptr() % device.alignment == 0 else tensor.clone()
        return placed


class TensorRTVision:
    """See :class:`qwen2vl_trt.runtime.backends.runners.VisionRunner`."""

    padded = True

    def __init__(self, engine: Engine) -> None:
        stream_weights(engine)
        self._engine, self._contexts = engine, _Contexts(engine)
        self._indices = cached_layouts(lambda layout: self._contexts.to_device(layout.index_tensors))

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        output, device = self._engine.tensors["image_embeds"], self._engine.device.torch_device
        embeds = torch.empty(len(layout.merge_index), output.shape[1], dtype=output.dtype, device=device)
        pixels = self._contexts.to_device({"pixel_values": pixel_values})
        self._contexts.run(pixels | self._indices(layout), {"image_embeds": embeds}, {})
        return embeds

    def profile(self, report: ReportLayer) -> None:
        """Report the name and milliseconds of every layer from now on, which slows every call."""
        self._engine = replace(self._engine, report_layer=report)
        self._contexts = _Contexts(self._engine)


class TensorRTDecoder:
    """See :class:`qwen2vl_trt.runtime.backends.runners.DecoderRunner`.

    Args:
        engine: the decoder.
        checkpoint: has the token embeddings.
        profile: the engine's limits.
        cuda_graphs: decode under CUDA graphs, unless weights are streamed.

    Raises:
        EngineError: the cache does not fit.
    """

    packed, enqueues = False, True

    def __init__(self, engine: Engine, checkpoint: Checkpoint, profile: BuildProfile, cuda_graphs: bool = True) -> None:
        text, device = checkpoint.config.text, engine.device
        self._engine, self._contexts = engine, _Contexts(engine)
        embeds = engine.tensors["inputs_embeds"]
        dtype = engine.tensors[cache_names(1)[0][0]].dtype
        check_rows(text, profile, dtype)
        # The profile for decoding is the one with the smallest maximum of new tokens: 1.
        decode_profile = min(range(len(embeds.profiles)), key=lambda index: embeds.profiles[index][1][1])
        table = text.vocab_size * text.hidden_size * embeds.dtype.itemsize
        cache = profile.max_num_seqs * profile.max_seq_len * token_bytes(text, dtype)
        streams = stream_weights(engine, table + cache)
        activations = engine.handle.get_device_memory_size_for_profile_v2(decode_profile)  # more if weights stream
        check_cache(text, profile, dtype, device.free_memory() - table - activations)
        self.embed = TokenEmbedding(checkpoint, embeds.dtype, device.torch_device)
        self.slots, self.vocab_size = profile.max_num_seqs, text.vocab_size
        self.cache = KVCache(text, self.slots, profile.max_seq_len, dtype, device.torch_device, fixed=True)
        self._graphs = DecodeGraphs(engine, self.cache, decode_profile) if cuda_graphs and not streams else None

    def step(
        self,
        chunks: Sequence[Chunk],
        inputs_embeds: Tensor,
        position_ids: Tensor,
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        batch, longest, first = len(chunks), max(chunk.length for chunk in chunks), chunks[0].slot
        self.cache.reserve(max(chunk.start for chunk in chunks) + longest)
        self.cache.lengths[first : first + batch] = [chunk.end for chunk in chunks]
        outputs = None
        if self._graphs is not None and longest == 1:
            outputs = self._graphs.step(chunks, inputs_embeds, position_ids)
        if outputs is None:
            outputs = _outputs(self._engine, batch, longest)
            inputs = self._contexts.to_device(graph_inputs(chunks, inputs_embeds, position_ids))
            self._contexts.run(inputs, outputs, _cache_tensors(self.cache, first, batch))
        return graph_step(chunks, wanted, outputs["logits"], outputs["hidden_states"] if hidden else None)

    def profile(self, report: ReportLayer) -> None:
        """As :meth:`TensorRTVision.profile`; without CUDA graphs, whose layers TensorRT cannot time."""
        self._engine = replace(self._engine, report_layer=report)
        self._contexts, self._graphs = _Contexts(self._engine), None

    def reset(self) -> None:
        """The cache stays allocated: TensorRT takes no other capacity."""
        self.cache.lengths = [0] * self.slots

    def warm_up(self, chunk: int, longest: int) -> None:
        """Creates both contexts and captures the graphs of all batch sizes."""
        run_steps(self, chunk, graph_batches(self.slots))


@dataclass
class _Graph:
    """A decode step's tensors, which must stay alive, and its CUDA graph: ``replay`` is None until it is captured."""

    context: ExecutionContext
    inputs: dict[str, Tensor]
    lengths: Tensor  # [2, B or more]: cache_start and kv_lengths, each at an aligned address
    outputs: dict[str, Tensor]
    activations: Tensor
    replay: Callable[[], None] | None = None


class DecodeGraphs:
    """Decode steps under CUDA graphs, one for each padded batch size.

    A context's state is part of what is captured, so each graph has its own context; they share activation memory
    (https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html, CUDA graphs).

    Args:
        engine: the decoder.
        cache: must never be reallocated.
        profile: index of the optimisation profile for decoding.
    """

    def __init__(self, engine: Engine, cache: KVCache, profile: int) -> None:
        self._engine, self._cache, self._profile = engine, cache, profile
        self._graphs: dict[int, _Graph] = {}
        self._memory = ActivationMemory(engine.device.torch_device)
        self._outputs = _outputs(engine, cache.slots, 1)  # memory of the caller's stream, which reads them

    def step(self, chunks: Sequence[Chunk], inputs_embeds: Tensor, position_ids: Tensor) -> dict[str, Tensor] | None:
        """One token a slot, see :meth:`qwen2vl_trt.runtime.backends.runners.DecoderRunner.step`.

        Returns buffers of the graph; None if a padding slot is full.
        """
        first, last = chunks[0].slot, chunks[-1].slot + 1
        batch = padded_batch(last, self._cache.slots)
        rows = padded_step(first, [chunk.start for chunk in chunks], self._cache.lengths, batch, self._cache.capacity)
        if rows is None:
            return None
        device = self._engine.device
        with device.stream() as stream:
            graph = self._graphs.get(batch) or self._prepare(batch, stream)
            graph.inputs["inputs_embeds"][first:last, 0].copy_(inputs_embeds)
            graph.inputs["position_ids"][:, first:last, 0].copy_(device.pinned(position_ids), non_blocking=True)
            graph.lengths[:, :batch].copy_(device.pinned(torch.tensor(rows)), non_blocking=True)
            if graph.replay is not None:
                graph.replay()
            else:  # run this step eagerly, as TensorRT requires before a capture; the next one replays
                graph.context.enqueue(stream)
                self._capture(graph, stream)
        return {name: tensor[first:last] for name, tensor in graph.outputs.items()}

    def _prepare(self, batch: int, stream: int) -> _Graph:
        engine, device = self._engine, self._engine.device.torch_device
        # For the profile's largest batch, so that it is never reallocated.
        activations = self._memory.reserve(engine.handle.get_device_memory_size_for_profile_v2(self._profile))
        context = ExecutionContext(engine, self._profile, self._memory, stream, specialise=True)
        embeds = engine.tensors["inputs_embeds"]
        lengths = torch.zeros(2, -(-batch // _ALIGNMENT) * _ALIGNMENT, dtype=torch.int64, device=device)
        inputs = {
            "inputs_embeds": torch.zeros(batch, 1, embeds.shape[2], dtype=embeds.dtype, device=device),
            "position_ids": torch.zeros(3, batch, 1, dtype=torch.int64, device=device),
            "cache_start": lengths[0, :batch],
            "kv_lengths": lengths[1, :batch],
            "last_token": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        outputs = {name: tensor[:batch] for name, tensor in self._outputs.items()}
        context.prepare(inputs, outputs, _cache_tensors(self._cache, 0, batch))
        self._graphs[batch] = _Graph(context, inputs, lengths, outputs, activations)
        return self._graphs[batch]

    def _capture(self, graph: _Graph, stream: int) -> None:
        try:
            if not graph.context.capturable(stream):
                raise RuntimeError("TensorRT cannot capture it")
            graph.replay = self._engine.device.capture(graph.context.enqueue)
        except (RuntimeError, EngineError) as error:
            logger.warning("decoding goes on without a CUDA graph, which costs time: %s", " ".join(str(error).split()))
            graph.replay = lambda: graph.context.enqueue(stream)


def _outputs(engine: Engine, batch: int, length: int) -> dict[str, Tensor]:
    """Memory for the decoder's outputs."""
    logits, states = engine.tensors["logits"], engine.tensors["hidden_states"]
    width, device = engine.tensors["inputs_embeds"].shape[2], engine.device.torch_device
    return {
        "logits": torch.empty(batch, logits.shape[1], dtype=logits.dtype, device=device),
        "hidden_states": torch.empty(batch, length, width, dtype=states.dtype, device=device),
    }


def _cache_tensors(cache: KVCache, first: int, count: int) -> dict[str, Tensor]:
    """Caches of neighbouring slots by the graph's names."""
    names = cache_names(len(cache.k))
    return {name: rows for group, layers in zip(names, cache.rows(first, count)) for name, rows in zip(group, layers)}
