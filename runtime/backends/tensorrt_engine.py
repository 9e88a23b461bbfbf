"""Loading a TensorRT plan, checked against its engine folder and this GPU; the GPU and its stream."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.tensorrt_callbacks import tensorrt_log
from qwen2vl_trt.engines.tensorrt_profiles import decoder_ranges, vision_ranges
from qwen2vl_trt.engines.tensorrt_refit import refit
from qwen2vl_trt.errors import EngineError

from .tensorrt_tensors import ALIGNMENT, EngineTensor, check_tensors, expected_tensors, format_bytes, streaming_budget

logger = logging.getLogger(__name__)

ReportLayer = Callable[[str, float], None]


class CudaDevice:
    """One GPU with a stream of its own: on the default stream TensorRT synchronises the whole device.

    Runners enqueue on this stream alone, so that execution contexts and their memory are never used concurrently.
    Tests replace this class by one for the CPU.

    Args:
        device: a GPU.
        priority: of the stream; where work of several waits, the GPU takes that of the lowest number first.

    Raises:
        EngineError: not a GPU.
    """

    alignment = ALIGNMENT

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        if device.type != "cuda":
            raise EngineError(
                f"TensorRT engines run on an NVIDIA GPU, not on {device}; build for --backend onnxruntime or torch to"
                " run there"
            )
        self.torch_device = device
        self._stream = torch.cuda.Stream(device, priority)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def compute_capability(self) -> str:
        """``8.9``."""
        return "{}.{}".format(*torch.cuda.get_device_capability(self.torch_device))

    def free_memory(self) -> int:
        """Bytes that can be allocated: free on the GPU, or cached by PyTorch."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + cached

    def pinned(self, tensor: Tensor) -> Tensor:
        """A host tensor in pinned memory, for an asynchronous copy; a GPU tensor as it is."""
        return tensor if tensor.is_cuda else tensor.contiguous().pin_memory()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make it the current device, on which TensorRT deserialises engines and creates contexts."""
        with torch.cuda.device(self.torch_device):
            yield

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Switch to the own stream, ordered after the caller's stream on entry and before it on exit.

        Yields:
            The stream's handle. Tensors created inside belong to this stream.
        """
        callers = torch.cuda.current_stream(self.torch_device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        callers.wait_stream(self._stream)

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        """Capture a CUDA graph inside :meth:`stream`; returns its replay. Raises RuntimeError if it cannot."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue(self._stream.cuda_stream)
        return graph.replay


@dataclass(frozen=True)
class Engine:
    """A deserialised engine.

    Attributes:
        name: ``vision`` or ``decoder``.
        trt: the TensorRT module.
        handle: ``ICudaEngine``.
        tensors: inputs and outputs by name.
        device: where its weights are.
        log: collects TensorRT's errors.
        runtime: ``Runtime``, which must outlive the engine.
        report_layer: called with the name and the milliseconds of every layer that runs outside a CUDA graph.
    """

    name: str
    trt: Any
    handle: Any
    tensors: dict[str, EngineTensor]
    device: CudaDevice
    log: Any
    runtime: Any
    report_layer: ReportLayer | None = None

    def failure(self, what: str) -> EngineError:
        """An error with TensorRT's reason, which is then cleared from the log."""
        reason = "; ".join(self.log.errors) or "no reason given"
        self.log.clear()
        return EngineError(f"{self.name} engine: {what}: {reason}")


def load_engine(
    folder: Path, name: str, manifest: Manifest, config: Qwen2VLConfig, device: CudaDevice, plan_name: str | None = None
) -> Engine:
    """Deserialise a plan and its weights, and check it against manifest, graph and GPU.

    Args:
        folder: of the engines.
        name: of its graph, ``vision`` or ``decoder``.
        manifest: of the folder.
        config: of the model.
        device: to run on.
        plan_name: where it is not the graph's.

    Raises:
        EngineError: built by another release or for another GPU, truncated, not of this folder, or out of memory.
        MissingDependencyError: TensorRT is not installed.
    """
    backend = BACKENDS[manifest.backend]
    trt = backend.load()
    check_release(manifest, backend.package, str(trt.__version__))
    check_gpu(manifest, device.name, device.compute_capability)
    path, onnx_path, log = folder / f"{plan_name or name}.engine", folder / f"{name}.onnx", tensorrt_log(trt)
    log.clear()
    with device.active():
        runtime = trt.Runtime(log)
        # Mapped: no second copy in memory, and no callback into Python as with IStreamReaderV2.
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                handle = runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            raise EngineError(f"{path} cannot be read: {error}. Rebuild.") from None
        if handle is None:
            raise EngineError(
                f"{path} does not load in {trt.__name__} {trt.__version__} on {device.name} (compute capability"
                f" {device.compute_capability}): {'; '.join(log.errors) or 'no reason given'}. Rebuild on this machine,"
                " or free GPU memory if it is that."
            )
        tensors, limits = describe(trt, handle), manifest.profile
        profiles = (vision_ranges(limits, config.vision),) if name == "vision" else decoder_ranges(limits)
        check_tensors(tensors, expected_tensors(onnx_path, profiles), path.name)
        if manifest.options.get("strip_weights"):
            refit(trt, handle, log, onnx_path)
    return Engine(name, trt, handle, tensors, device, log, runtime)


def stream_weights(engine: Engine, reserved: int = 0) -> bool:
    """Set the weight streaming budget to what fits beside activations, if the plan was built for it.

    Args:
        engine: not yet with an execution context.
        reserved: bytes that other things need.

    Returns:
        Whether weights are streamed. An enqueue then waits for them, so no CUDA graph can be captured.
    """
    handle, streamable = engine.handle, engine.handle.streamable_weights_size
    if not streamable:
        return False
    with engine.device.active():
        _set_budget(engine, 0)  # no weights on the GPU: free memory and activations are at their most
        profiles = range(handle.num_optimization_profiles)
        activations = sum(handle.get_device_memory_size_for_profile_v2(profile) for profile in profiles)
        budget = streaming_budget(streamable, engine.device.free_memory(), activations + reserved)
        _set_budget(engine, budget)
    if budget < streamable:
        logger.warning(
            "%s engine: %s of %s weights do not fit on the GPU and are copied to it in every call, without CUDA graphs,"
            " which costs time. Free GPU memory, or rebuild with a smaller --max-batch-size or --max-seq-len.",
            engine.name,
            format_bytes(streamable - budget),
            format_bytes(streamable),
        )
    return budget < streamable


def _set_budget(engine: Engine, budget: int) -> None:
    engine.handle.weight_streaming_budget_v2 = budget
    if engine.handle.weight_streaming_budget_v2 != budget:  # the bindings drop the call's return value
        raise engine.failure(f"{format_bytes(budget)} of its weights cannot be kept on the GPU")


def check_release(manifest: Manifest, package: str, installed: str) -> None:
    """Raises EngineError for a plan of another TensorRT release, which does not load."""
    built = manifest.versions.get(package)
    if built != installed:
        raise EngineError(
            f"the engine was built with {package} {built} and {installed} is installed; a plan runs in its own"
            " release alone. Rebuild, or install that one."
        )


def check_gpu(manifest: Manifest, gpu: str, compute_capability: str) -> None:
    """Raises EngineError for a plan built for GPUs of other compute capabilities."""
    capabilities = manifest.options.get("compute_capabilities")
    if capabilities and compute_capability not in capabilities:
        raise EngineError(
            f"the engine was built for GPUs of compute capability {', '.join(capabilities)}; {gpu} has"
            f" {compute_capability}. Rebuild with --compute-capabilities {compute_capability}."
        )


def describe(trt: Any, handle: Any) -> dict[str, EngineTensor]:
    """Inputs and outputs of an ``ICudaEngine``, by name."""
    dtypes = {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
    }
    tensors = {}
    for index in range(handle.num_io_tensors):
        name = handle.get_tensor_name(index)
        is_input = handle.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        profiles = range(handle.num_optimization_profiles if is_input else 0)
        shapes = [handle.get_tensor_profile_shape(name, profile) for profile in profiles]
        tensors[name] = EngineTensor(
            tuple(handle.get_tensor_shape(name)),
            dtypes.get(handle.get_tensor_dtype(name), handle.get_tensor_dtype(name)),
            is_input,
            None if is_input else handle.get_aliased_input_tensor(name) or None,
            tuple((tuple(min_shape), tuple(max_shape)) for min_shape, _, max_shape in shapes),
        )
    return tensors
