"""The TensorRT backends: plans of TensorRT and of TensorRT for RTX, on a GPU.

Tensors are PyTorch's, bound by address. The decoder's caches are bound as input and output at once, and TensorRT
updates them in place.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.export.graphs import cache_names
from qwen2vl_trt.windows import WindowLayout

from .common import KVCache, TokenEmbedding, cached_layouts, graph_sizes, step_inputs
from .runners import Engines, Step, run_steps
from .tensorrt_context import ExecutionContext, Scratch
from .tensorrt_decode_graphs import DecodeGraphs
from .tensorrt_engine import CudaDevice, Engine, ReportLayer, load_engine, stream_weights
from .tensorrt_tensors import check_cache, check_rows, choose_profile, token_bytes


def default_device() -> str:
    """The GPU.

    Raises:
        EngineError: there is none.
    """
    if not torch.cuda.is_available():
        raise EngineError(
            f"TensorRT engines run on an NVIDIA GPU, and PyTorch {torch.__version__} sees none here. Run on a machine"
            " with one (and a PyTorch built for CUDA), or build for --backend onnxruntime or torch."
        )
    return "cuda"


def load_vision(engines: Engines) -> TensorRTVision:
    """Load the vision plan; raises as :func:`qwen2vl_trt.runtime.backends.tensorrt_engine.load_engine`."""
    return TensorRTVision(_load(engines, "vision"))


def load_decoder(engines: Engines) -> TensorRTDecoder:
    """Load the decoder plan and allocate its cache.

    Raises:
        EngineError: as :func:`qwen2vl_trt.runtime.backends.tensorrt_engine.load_engine`, or the cache does not fit.
    """
    return TensorRTDecoder(_load(engines, "decoder"), engines.checkpoint, engines.manifest.profile)


def _load(engines: Engines, name: str) -> Engine:
    device = CudaDevice(engines.device)
    return load_engine(engines.folder, name, engines.manifest, engines.checkpoint.config, device)


class _Contexts:
    """An engine's execution contexts, one an optimisation profile, over the same memory for activations."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._scratch = engine, Scratch(engine.device.torch_device)
        self._contexts: dict[int, ExecutionContext] = {}

    def run(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], aliased: dict[str, Tensor]) -> None:
        """Run the engine.

        Args:
            inputs: as :meth:`place` gives them.
            outputs: on the GPU, in the engine's types.
            aliased: inputs that the engine also writes to, as the output ``new_`` + name.

        Raises:
            LimitError: the inputs' shapes are outside every profile.
            EngineError: TensorRT's own reason.
        """
        engine, device = self._engine, self._engine.device
        shapes = {name: tuple(tensor.shape) for name, tensor in (inputs | aliased).items()}
        profile = choose_profile(engine.tensors, shapes, engine.name)
        with device.stream() as stream:
            if profile not in self._contexts:
                self._contexts[profile] = ExecutionContext(engine, profile, self._scratch, stream)
            context = self._contexts[profile]
            context.set_shapes(shapes)
            for name, tensor in (inputs | outputs | aliased).items():
                context.bind(name, tensor)
            for name, tensor in aliased.items():
                context.bind(f"new_{name}", tensor)
            context.enqueue(stream)

    def place(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs as the engine takes them: on the GPU, in its types, aligned.

        Args:
            inputs: on the host or on the GPU, in any type that the engine's can be made from.
        """
        with self._engine.device.stream():
            return {name: self._placed(name, tensor) for name, tensor in inputs.items()}

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        device, dtype = self._engine.device, self._engine.tensors[name].dtype
        tensor = device.staged(tensor).to(device.torch_device, dtype, non_blocking=True).contiguous()
        return tensor if tensor.data_ptr() % device.alignment == 0 else tensor.clone()


class TensorRTVision:
    """See :class:`qwen2vl_trt.runtime.backends.runners.VisionRunner`."""

    def __init__(self, engine: Engine) -> None:
        stream_weights(engine)
        self._engine, self._contexts = engine, _Contexts(engine)
        self._indices = cached_layouts(lambda layout: self._contexts.place(layout.index_tensors))

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        output = self._engine.tensors["image_embeds"]
        embeds = torch.empty(
            len(layout.merge_index), output.shape[1], dtype=output.dtype, device=self._engine.device.torch_device
        )
        pixels = self._contexts.place({"pixel_values": pixel_values})
        self._contexts.run(pixels | self._indices(layout), {"image_embeds": embeds}, {})
        return embeds

    def profile(self, report: ReportLayer) -> None:
        """From now on tell ``report`` the name and the milliseconds of every layer; each call then takes longer."""
        self._engine = replace(self._engine, report_layer=report)
        self._contexts = _Contexts(self._engine)


class TensorRTDecoder:
    """See :class:`qwen2vl_trt.runtime.backends.runners.DecoderRunner`.

    Args:
        engine: the decoder.
        checkpoint: has the text embeddings.
        profile: the engine's limits.
        cuda_graphs: decode under CUDA graphs, unless weights are streamed.

    Raises:
        EngineError: the cache does not fit.
    """

    def __init__(self, engine: Engine, checkpoint: Checkpoint, profile: BuildProfile, cuda_graphs: bool = True) -> None:
        text, device, handle = checkpoint.config.text, engine.device, engine.handle
        self._engine, self._contexts = engine, _Contexts(engine)
        dtype, embed_dtype = engine.tensors[cache_names(1)[0][0]].dtype, engine.tensors["inputs_embeds"].dtype
        check_rows(text, profile, dtype)
        generation = _generation_profile(engine)
        table = text.vocab_size * text.hidden_size * embed_dtype.itemsize
        cache = profile.max_batch_size * profile.max_seq_len * token_bytes(text, dtype)
        streams = stream_weights(engine, table + cache)
        activations = handle.get_device_memory_size_for_profile_v2(generation)  # more where weights are streamed
        check_cache(text, profile, dtype, device.free_memory() - table - activations)
        self.embed = TokenEmbedding(checkpoint, embed_dtype, device.torch_device)
        self.slots = profile.max_batch_size
        self.cache = KVCache(text, self.slots, profile.max_seq_len, dtype, device.torch_device, fixed=True)
        self._held = [0] * self.slots  # tokens in each slot
        self._graphs = DecodeGraphs(engine, self.cache, generation) if cuda_graphs and not streams else None

    def step(
        self, first_slot: int, inputs_embeds: Tensor, position_ids: Tensor, starts: list[int], hidden: bool = False
    ) -> Step:
        batch, length, _ = inputs_embeds.shape
        self.cache.reserve(max(starts) + length)
        self._held[first_slot : first_slot + batch] = [start + length for start in starts]
        if self._graphs is not None and length == 1:
            outputs = self._graphs.step(first_slot, inputs_embeds, position_ids, starts, self._held)
            if outputs is not None:
                return Step(outputs[0], outputs[1] if hidden else None)
        tensors, device = self._engine.tensors, self._engine.device.torch_device
        inputs = step_inputs(inputs_embeds, position_ids, starts)
        logits = torch.empty(batch, tensors["logits"].shape[1], dtype=tensors["logits"].dtype, device=device)
        states = torch.empty(inputs_embeds.shape, dtype=tensors["hidden_states"].dtype, device=device)
        caches = {
            name: rows
            for names, layers in zip(cache_names(len(self.cache.k)), self.cache.rows(first_slot, batch))
            for name, rows in zip(names, layers)
        }
        self._contexts.run(self._contexts.place(inputs), {"logits": logits, "hidden_states": states}, caches)
        return Step(logits, states if hidden else None)

    def profile(self, report: ReportLayer) -> None:
        """As :meth:`TensorRTVision.profile`; decoding leaves its CUDA graphs, whose layers TensorRT cannot time."""
        self._engine = replace(self._engine, report_layer=report)
        self._contexts, self._graphs = _Contexts(self._engine), None

    def reset(self) -> None:
        """The cache keeps its memory: TensorRT takes no other capacity."""
        self._held = [0] * self.slots

    def warm_up(self, chunk: int, longest: int) -> None:
        """Makes both contexts and captures the graph of every number of slots, each over the whole cache."""
        run_steps(self, chunk, graph_sizes(self.slots))


def _generation_profile(engine: Engine) -> int:
    """The one that takes a single new token a request and no more."""
    embeds = engine.tensors["inputs_embeds"].profiles
    return min(range(len(embeds)), key=lambda profile: embeds[profile][1][1])
