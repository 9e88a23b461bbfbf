"""From a plan in an engine folder to an engine that is known to belong there and to run here."""

from __future__ import annotations

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
from qwen2vl_trt.engines.tensorrt_profiles import Ranges, decoder_ranges, vision_ranges
from qwen2vl_trt.engines.tensorrt_refit import refit
from qwen2vl_trt.errors import EngineError

from .tensorrt_tensors import ALIGNMENT, EngineTensor, check_tensors, expected_tensors, format_bytes, streaming_budget

ReportLayer = Callable[[str, float], None]


@dataclass(frozen=True)
class Engine:
    """A deserialised engine.

    Attributes:
        name: ``vision`` or ``decoder``.
        trt: the TensorRT module.
        handle: its ``ICudaEngine``.
        tensors: inputs and outputs by name.
        device: where its weights are.
        log: what TensorRT says of it.
        runtime: the ``Runtime``, which must outlive it.
        report_layer: where set, told the name and the milliseconds of every layer that runs outside a CUDA graph.
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
        """An error with TensorRT's own reason, which is then no reason of a later one."""
        reason = "; ".join(self.log.errors) or "no reason given"
        self.log.clear()
        return EngineError(f"{self.name} engine: {what}: {reason}")


def load_engine(folder: Path, name: str, manifest: Manifest, config: Qwen2VLConfig, device: CudaDevice) -> Engine:
    """Deserialise a plan, with its weights, and check it against manifest, graph and GPU.

    Args:
        folder: of the engine; verified.
        name: ``vision`` or ``decoder``.
        manifest: the folder's.
        config: the model's.
        device: to run on.

    Raises:
        EngineError: made by another release or for another GPU, truncated, not of this folder, or out of memory.
        MissingDependencyError: TensorRT is not installed.
    """
    trt = BACKENDS[manifest.backend].load()
    check_release(manifest, trt.__name__, str(trt.__version__))
    check_gpu(manifest, device.name, device.compute_capability)
    path, log = folder / f"{name}.engine", tensorrt_log(trt)
    log.clear()
    with device.active():
        runtime = trt.Runtime(log)
        # Mapped, not read: no second copy in memory, and no callback into Python as with IStreamReaderV2.
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
        tensors = describe(trt, handle)
        check_tensors(tensors, expected_tensors(folder / f"{name}.onnx", _profiles(name, manifest, config)), path.name)
        if manifest.options.get("strip_weights"):
            refit(trt, handle, log, folder / f"{name}.onnx")
    return Engine(name, trt, handle, tensors, device, log, runtime)


def stream_weights(engine: Engine, others: int = 0) -> bool:
    """Keep as many weights on the GPU as fit beside activations, where the plan was built with weight streaming.

    Call it before the engine has an execution context.

    Args:
        engine: whose contexts use one block of memory for each optimisation profile.
        others: bytes that are needed for other things.

    Returns:
        Whether some are streamed. Enqueueing then waits for them, which no CUDA graph can hold.

    Raises:
        EngineError: TensorRT's own reason.
    """
    handle, streamable = engine.handle, engine.handle.streamable_weights_size
    if not streamable:
        return False
    with engine.device.active():
        _set_budget(engine, 0)  # none on the GPU: what is free then is free for all, and activations are at their most
        profiles = range(handle.num_optimization_profiles)
        activations = sum(handle.get_device_memory_size_for_profile_v2(profile) for profile in profiles)
        budget = streaming_budget(streamable, engine.device.free_memory(), activations + others)
        _set_budget(engine, budget)
    return budget < streamable


def _set_budget(engine: Engine, budget: int) -> None:
    engine.handle.weight_streaming_budget_v2 = budget
    if engine.handle.weight_streaming_budget_v2 != budget:  # the bindings drop what the call returns
        raise engine.failure(f"{format_bytes(budget)} of its weights cannot be kept on the GPU")


def check_release(manifest: Manifest, package: str, installed: str) -> None:
    """A plan loads in the release that built it alone.

    Raises:
        EngineError: it is of another.
    """
    built = manifest.versions.get(package)
    if built != installed:
        raise EngineError(
            f"the engine was built with {package} {built} and {installed} is installed; a plan runs in its own"
            " release alone. Rebuild, or install that one."
        )


def check_gpu(manifest: Manifest, gpu: str, compute_capability: str) -> None:
    """See whether a plan that names its GPUs names this one.

    Raises:
        EngineError: it does not.
    """
    capabilities = manifest.options.get("compute_capabilities")
    if capabilities and compute_capability not in capabilities:
        raise EngineError(
            f"the engine was built for GPUs of compute capability {', '.join(capabilities)}; {gpu} has"
            f" {compute_capability}. Rebuild with --compute-capabilities {compute_capability}."
        )


def describe(trt: Any, handle: Any) -> dict[str, EngineTensor]:
    """The inputs and outputs that an ``ICudaEngine`` has, by name."""
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
        ranges = [handle.get_tensor_profile_shape(name, profile) for profile in profiles]
        tensors[name] = EngineTensor(
            tuple(handle.get_tensor_shape(name)),
            dtypes.get(handle.get_tensor_dtype(name), handle.get_tensor_dtype(name)),
            is_input,
            None if is_input else handle.get_aliased_input_tensor(name) or None,
            tuple((tuple(least), tuple(most)) for least, _, most in ranges),
        )
    return tensors


def _profiles(name: str, manifest: Manifest, config: Qwen2VLConfig) -> tuple[Ranges, ...]:
    if name == "vision":
        return (vision_ranges(manifest.profile, config.vision),)
    return decoder_ranges(manifest.profile)


# MERGED runtime/backends/tensorrt_engine.py: """What the TensorRT runner asks of a GPU. Tests put the CPU in its place."""
class CudaDevice:
    """One GPU, and a stream of its own: TensorRT synchronises the whole device on the default stream.

    A runner enqueues on its device's stream alone, whatever stream its caller is on, so its execution contexts and
    their memory are never in use twice at once.

    Raises:
        EngineError: not a GPU.
    """

    alignment = ALIGNMENT

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise EngineError(
                f"TensorRT engines run on an NVIDIA GPU, not on {device}; build for --backend onnxruntime or torch to"
                " run there"
            )
        self.torch_device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    @property
    def compute_capability(self) -> str:
        """``8.9``."""
        return "{}.{}".format(*torch.cuda.get_device_capability(self.torch_device))

    def free_memory(self) -> int:
        """Bytes that can be allocated: free on the GPU, or kept by PyTorch and not in use."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + kept

    def staged(self, tensor: Tensor) -> Tensor:
        """A tensor whose copy to the GPU need not be waited for: pinned, where it is on the host."""
        return tensor if tensor.is_cuda else tensor.contiguous().pin_memory()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make it the current one: TensorRT deserialises onto that, and makes its contexts there."""
        with torch.cuda.device(self.torch_device):
            yield

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Enqueue on the own stream: after what the caller's stream holds, and before what it gets afterwards.

        Yields:
            The stream's handle. Tensors made inside belong to the own stream.
        """
        callers = torch.cuda.current_stream(self.torch_device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
        callers.wait_stream(self._stream)

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        """Record what is enqueued as a CUDA graph; call inside :meth:`stream`.

        Returns:
            Replays it on the stream that is then current.

        Raises:
            RuntimeError: it does something that a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue(self._stream.cuda_stream)
        return graph.replay
