"""The ONNX Runtime backend: the exported graphs, on the CPU or through its CUDA provider.

Each cache is bound as input and output, so that ``TensorScatter`` writes in place instead of copying it every step.
Binding takes a few microseconds a tensor, which two caches a layer add up: they are bound once, until they move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.export.graphs import cache_names
from qwen2vl_trt.windows import WindowLayout

from .common import KVCache, TokenEmbedding, cached_layouts, graph_inputs, graph_step
from .runners import Engines, run_steps
from .steps import Chunk, Step

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64}


def default_device() -> str:
    """A GPU if both ONNX Runtime and torch, which holds the tensors, can use one."""
    return "cuda" if "CUDAExecutionProvider" in ort.get_available_providers() and torch.cuda.is_available() else "cpu"


def load_vision(engines: Engines, session: ort.InferenceSession | None = None) -> OrtVision:
    """Open the vision graph, unless ``session`` is given; raises as :func:`open_session`."""
    session = session or open_session(engines.folder / "vision.onnx", engines.device, fp8=engines.precision.fp8)
    return OrtVision(session, engines.device)


def load_decoder(engines: Engines, session: ort.InferenceSession | None = None) -> OrtDecoder:
    """Open the decoder graph, unless ``session`` is given; raises as :func:`open_session`."""
    session = session or open_session(engines.folder / "decoder.onnx", engines.device, fp8=engines.precision.fp8)
    return OrtDecoder(session, engines.checkpoint, engines.manifest.profile, engines.precision.decoder, engines.device)


def open_session(
    path: Path, device: torch.device, model: bytes | None = None, profile: Path | None = None, fp8: bool = False
) -> ort.InferenceSession:
    """Open a graph.

    Args:
        path: the file; its weights lie beside it.
        device: CPU or GPU.
        model: replaces the file's content.
        profile: prefix of the file that ONNX Runtime writes each operator's time to.
        fp8: the graph has FP8 layers, which QDQ fusions turn into ones that ONNX Runtime then rejects. Weights of 4 and
            8 bits need those fusions.

    Raises:
        EngineError: it does not load, the device is not available, or this ONNX Runtime is too old.
    """
    BACKENDS["onnxruntime"].load()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # BF16 weights become FP32 once, at load. By default one above 1 GB (3B's embedding) would be converted every step.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(2**63 - 1))
    options.add_session_config_entry("session.disable_quant_qdq", str(int(fp8)))
    # Activations are rounded to 8 bits, block by block: several times as fast as FP32, and 8-bit weights have no other.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    # Threads that spin between operators take the cores that images, texts and a server need: docs/guide/serve.md.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if default_device() != "cuda":
            raise EngineError(
                f"device {device}: this ONNX Runtime ({', '.join(ort.get_available_providers())}) has none"
            )
        # TF32, which the provider uses by default, is off by 1e-3: FP32 here means FP32, as it does in PyTorch.
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(model or path, options, providers=providers)
    except Exception as error:  # pybind exceptions without a common public base
        raise EngineError(f"{path} does not load in ONNX Runtime: {' '.join(str(error).split())}") from None
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():  # it went on without
        raise EngineError(
            f"device {device}: ONNX Runtime {ort.__version__} could not start its CUDA provider, and says why on stderr"
            " (most often CUDA or cuDNN of another version). Mend that, or run on the CPU (--device cpu)."
        )
    return session


class Binding:
    """A session's ``IOBinding``, which is told only what lies elsewhere, or has another shape, than at its last run.

    It holds addresses, not tensors: every tensor must be given again at each run, or outlive the binding.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session, self._binding = session, session.io_binding()
        self._bound: dict[str, tuple[int, torch.Size]] = {}

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Name the graph's tensors; all contiguous, on the session's device."""
        for bind, tensors in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                address = tensor.data_ptr()
                if self._bound.get(name) != (address, tensor.shape):
                    device, dtype = tensor.device, _NUMPY[tensor.dtype]
                    bind(name, device.type, device.index or 0, dtype, tuple(tensor.shape), address)
                    self._bound[name] = address, tensor.shape

    def run(self, device: torch.device) -> None:
        """Run the graph.

        On CUDA a session computes on a stream of its own, which knows nothing of PyTorch's: so the host first waits for
        the current stream, on which inputs may still be written and outputs' memory still be read. It returns after the
        session's stream has ended, which is ONNX Runtime's default (``disable_synchronize_execution_providers``). The
        option ``user_compute_stream`` would fix one stream at load, and vision and decoder run on whichever is current;
        ``IOBinding.synchronize_inputs`` waits for the whole device, or for nothing, as the provider pleases.
        """
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._session.run_with_iobinding(self._binding)


class OrtVision:
    """See :class:`qwen2vl_trt.runtime.backends.runners.VisionRunner`."""

    padded = True

    def __init__(self, session: ort.InferenceSession, device: torch.device) -> None:
        self._session, self._device = session, device
        self._width: int = session.get_outputs()[0].shape[1]
        self._indices = cached_layouts(partial(_index_tensors, device=device))

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        inputs = {"pixel_values": pixel_values.to(self._device).contiguous(), **self._indices(layout)}
        embeds = torch.empty(len(layout.merge_index), self._width, dtype=pixel_values.dtype, device=self._device)
        binding = Binding(self._session)
        binding.bind(inputs, {"image_embeds": embeds})
        binding.run(self._device)
        return embeds


class OrtDecoder:
    """See :class:`qwen2vl_trt.runtime.backends.runners.DecoderRunner`."""

    packed, enqueues = False, False

    def __init__(
        self,
        session: ort.InferenceSession,
        checkpoint: Checkpoint,
        profile: BuildProfile,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        text = checkpoint.config.text
        self._session, self._device = session, device
        self.vocab_size = text.vocab_size
        self.embed = TokenEmbedding(checkpoint, dtype, device)
        self.slots = profile.max_num_seqs
        self.cache = KVCache(text, self.slots, profile.max_seq_len, dtype, device)
        # A bound method would be a cycle, and session and cache stay in memory until Python's collector runs.
        names = cache_names(text.num_hidden_layers)
        self._binding = lru_cache(maxsize=64)(partial(_bind_caches, session, self.cache, names))
        self._logits = torch.empty(self.slots, self.vocab_size, device=device)
        # Where the inputs of every decode step lie, one after the other for as many slots as it has.
        self._decode = {"inputs_embeds": torch.empty(self.slots * text.hidden_size, dtype=dtype, device=device)}
        for name, rows in (("position_ids", 3), ("cache_start", 1), ("kv_lengths", 1), ("last_token", 1)):
            self._decode[name] = torch.empty(self.slots * rows, dtype=torch.int64, device=device)

    def step(
        self,
        chunks: Sequence[Chunk],
        inputs_embeds: Tensor,
        position_ids: Tensor,
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        batch, longest = len(chunks), max(chunk.length for chunk in chunks)
        self.cache.reserve(max(chunk.start for chunk in chunks) + longest)
        inputs = graph_inputs(chunks, inputs_embeds, position_ids)
        if longest == 1:
            inputs = {
                name: self._decode[name][: like.numel()].view_as(like).copy_(like) for name, like in inputs.items()
            }
        else:
            inputs = {name: tensor.to(self._device).contiguous() for name, tensor in inputs.items()}
        outputs = {"logits": self._logits.narrow(0, 0, batch)}
        if hidden:
            outputs["hidden_states"] = torch.empty_like(inputs["inputs_embeds"])
        binding = self._binding(chunks[0].slot, batch, hidden, self.cache.allocations)
        binding.bind(inputs, outputs)
        binding.run(self._device)
        return graph_step(chunks, wanted, outputs["logits"], outputs.get("hidden_states"))

    def reset(self) -> None:
        self.cache.reset()

    def warm_up(self, chunk: int, longest: int) -> None:
        """Runs the smallest and the largest batch; there are no graphs to capture."""
        run_steps(self, chunk, {1, self.slots})


def _index_tensors(layout: WindowLayout, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device).contiguous() for name, tensor in layout.index_tensors.items()}


def _bind_caches(
    session: ort.InferenceSession,
    cache: KVCache,
    names: tuple[list[str], list[str]],
    first: int,
    batch: int,
    hidden: bool,
    allocations: int,
) -> Binding:
    """For steps of ``batch`` slots from ``first`` on, until the cache is allocated anew.

    An output that is bound is written, so steps with hidden states have bindings of their own.
    """
    binding = Binding(session)
    for each, caches in zip(names, cache.rows(first, batch)):
        bound = dict(zip(each, caches))
        binding.bind(bound, {f"new_{name}": tensor for name, tensor in bound.items()})
    return binding
