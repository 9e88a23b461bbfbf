"""TensorRT execution contexts and their activation memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.errors import EngineError

from .tensorrt_engine import Engine, ReportLayer
from .tensorrt_tensors import Shape, format_bytes


class ActivationMemory:
    """A buffer that grows to what current shapes need; for a profile's largest, with strips, it is four times that."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> Tensor:
        """The buffer, grown to at least ``size`` bytes. Raises EngineError if out of memory."""
        if self._block.numel() < size:
            self._block = torch.empty(0, dtype=torch.uint8, device=self._device)  # release the smaller one first
            try:
                self._block = torch.empty(size, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                raise EngineError(
                    f"not enough GPU memory: activations need {format_bytes(size)} for these sizes. Send fewer or"
                    " smaller images or shorter chunks at once (--max-pixels), or free GPU memory."
                ) from None
        return self._block


class ExecutionContext:
    """One ``IExecutionContext`` with one optimisation profile.

    Call its methods inside :meth:`~qwen2vl_trt.runtime.backends.tensorrt_engine.CudaDevice.stream`.

    Args:
        engine: see :func:`qwen2vl_trt.runtime.backends.tensorrt_engine.load_engine`.
        profile: index of the optimisation profile.
        memory: shared by contexts that never run at the same time.
        stream: handle of the stream.
        specialise: TensorRT for RTX: compile kernels for the exact shapes at once, not in the background.

    Raises:
        EngineError: with TensorRT's reason, here and in every method.
    """

    def __init__(
        self, engine: Engine, profile: int, memory: ActivationMemory, stream: int, specialise: bool = False
    ) -> None:
        self._engine, self._memory = engine, memory
        self._context = _create(engine, specialise)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._device_memory: tuple[int, int] | None = None  # address and size
        if self._context is None or not self._context.set_optimization_profile_async(profile, stream):
            raise engine.failure("no execution context")
        # Detailed markers would cost time in every enqueue; the plan needs them only for its layers' names.
        self._context.nvtx_verbosity = engine.trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        if engine.report_layer is not None:
            self._profiler = _profiler(engine.trt, engine.report_layer)  # the context does not keep it alive
            self._context.profiler = self._profiler

    def prepare(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor], caches: dict[str, Tensor]) -> None:
        """Set shapes, activation memory and addresses.

        Args:
            inputs: of the engine's types, contiguous; like the others, they must stay alive until the work is done.
            outputs: likewise.
            caches: inputs that are written in place, as the output ``new_`` + name.
        """
        self._set_shapes({name: tuple(tensor.shape) for name, tensor in (inputs | caches).items()})
        for name, tensor in (inputs | outputs | caches).items():
            self._bind(name, tensor)
        for name, tensor in caches.items():
            self._bind(f"new_{name}", tensor)

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise self._engine.failure("it cannot be run")

    def capturable(self, stream: int) -> bool:
        """Whether a CUDA graph can be captured; only TensorRT for RTX knows before it is tried."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or ask(stream)

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        changed = {name: shape for name, shape in shapes.items() if self._shapes.get(name) != shape}
        if changed:
            self._shapes, known = {}, self._shapes  # after a failure, all shapes are set again
            self._needed = self._infer_memory(changed)
            self._shapes = known | changed
        block = self._memory.reserve(self._needed)
        memory = block.data_ptr(), block.numel()
        if changed or memory != self._device_memory:  # no reference to the block: it would outlive a larger one
            self._context.set_device_memory(*memory)
            self._device_memory = memory

    def _infer_memory(self, changed: dict[str, Shape]) -> int:
        """Set new shapes; returns the bytes of activation memory for all."""
        self._engine.log.clear()  # so that a failure reports this call's errors alone
        for name, shape in changed.items():
            if not self._context.set_input_shape(name, shape):
                raise self._engine.failure(f"{name} cannot be {list(shape)}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._engine.failure(f"its shapes do not fit each other ({error})") from None
        if missing:
            raise self._engine.failure(f"the shape of {missing[0]} is not known")
        needed = int(self._context.update_device_memory_size_for_shapes())
        if not needed and self._engine.log.errors:  # which is how TensorRT reports a failure here
            raise self._engine.failure("the memory that its shapes need is not known")
        return needed

    def _bind(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self._engine.tensors[name].dtype, tuple(self._context.get_tensor_shape(name))
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise EngineError(
                f"{self._engine.name} engine: {name} is {dtype} {list(shape)}, contiguous; it got {tensor.dtype}"
                f" {list(tensor.shape)}"
            )
        address = tensor.data_ptr()
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise self._engine.failure(f"{name} cannot lie at {address:#x}")
            self._addresses[name] = address


def _create(engine: Engine, specialise: bool) -> Any:
    trt = engine.trt
    if specialise and hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        config = engine.handle.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return engine.handle.create_execution_context(config)
    return engine.handle.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def _profiler(trt: Any, report: ReportLayer) -> Any:
    class LayerProfiler(trt.IProfiler):
        def report_layer_time(self, layer_name: str, ms: float) -> None:
            report(layer_name, ms)

    return LayerProfiler()
