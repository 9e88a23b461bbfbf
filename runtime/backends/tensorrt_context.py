"""An execution context: shapes, addresses, memory for activations, enqueue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.errors import EngineError

from .tensorrt_engine import Engine, ReportLayer
from .tensorrt_tensors import Shape, format_bytes


class Scratch:
    """Memory for activations, grown to what shapes need: a profile's largest would be four times that, for strips."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = torch.empty(0, dtype=torch.uint8, device=device)

    def at_least(self, size: int) -> Tensor:
        """A block of so many bytes or more; the one before it is released.

        Raises:
            EngineError: there is not so much memory.
        """
        if self._block.numel() < size:
            self._block = torch.empty(0, dtype=torch.uint8, device=self._device)  # first give back the smaller one
            try:
                self._block = torch.empty(size, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                raise EngineError(
                    f"not enough GPU memory: activations need {format_bytes(size)} for these sizes. Send fewer or"
                    " smaller images or shorter chunks at once (--max-pixels), or free GPU memory."
                ) from None
        return self._block


class ExecutionContext:
    """One ``IExecutionContext`` in one optimisation profile.

    Call its methods inside the device's :meth:`~qwen2vl_trt.runtime.backends.tensorrt_engine.CudaDevice.stream`.

    Args:
        engine: see :func:`qwen2vl_trt.runtime.backends.tensorrt_engine.load_engine`.
        profile: index of the optimisation profile.
        scratch: shared by contexts that never run at the same time.
        stream: handle to enqueue on.
        specialise: TensorRT for RTX: compile kernels for the shapes at once, not while others run in their place.

    Raises:
        EngineError: TensorRT's own reason.
    """

    def __init__(self, engine: Engine, profile: int, scratch: Scratch, stream: int, specialise: bool = False) -> None:
        self._engine, self._scratch = engine, scratch
        self._context = _create(engine, specialise)
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._place: tuple[int, int] | None = None  # of the memory for activations
        if self._context is None or not self._context.set_optimization_profile_async(profile, stream):
            raise engine.failure("no execution context")
        # Detailed markers, which the plan has for its layers' names, would cost time in every enqueue.
        self._context.nvtx_verbosity = engine.trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        if engine.report_layer is not None:
            self._profiler = _profiler(engine.trt, engine.report_layer)  # the context does not keep it alive
            self._context.profiler = self._profiler

    def set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        """Tell the shapes of all inputs, and take the memory that they need.

        Raises:
            EngineError: TensorRT's own reason.
        """
        changed = {name: shape for name, shape in shapes.items() if self._shapes.get(name) != shape}
        if changed:
            self._shapes, known = {}, self._shapes  # whatever fails from here on, all are told anew the next time
            self._needed = self._tell(changed)
            self._shapes = known | changed
        block = self._scratch.at_least(self._needed)
        place = block.data_ptr(), block.numel()
        if changed or place != self._place:  # not the block itself: it would outlive a larger one
            self._context.set_device_memory(*place)
            self._place = place

    def _tell(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes that the work needs with these new shapes."""
        self._engine.log.clear()  # what is said of another call is no reason of this one
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._engine.failure(f"{name} cannot be {list(shape)}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._engine.failure(f"its shapes do not fit each other ({error})") from None
        if missing:
            raise self._engine.failure(f"the shape of {missing[0]} is not known")
        needed = int(self._context.update_device_memory_size_for_shapes())
        if not needed and self._engine.log.errors:  # which is how TensorRT says that it failed
            raise self._engine.failure("the memory that its shapes need is not known")
        return needed

    def output_shape(self, name: str) -> Shape:
        """The shape that an output will have."""
        return tuple(self._context.get_tensor_shape(name))

    def bind(self, name: str, tensor: Tensor) -> None:
        """Give an input or an output its memory: contiguous, in the engine's type, held until the enqueued work ends.

        Raises:
            EngineError: another type or shape than the engine's, or an address that TensorRT does not take.
        """
        dtype = self._engine.tensors[name].dtype
        if tensor.dtype != dtype or tuple(tensor.shape) != self.output_shape(name) or not tensor.is_contiguous():
            raise EngineError(
                f"{self._engine.name} engine: {name} is {dtype} {list(self.output_shape(name))}, contiguous; it got"
                f" {tensor.dtype} {list(tensor.shape)}"
            )
        address = tensor.data_ptr()
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise self._engine.failure(f"{name} cannot lie at {address:#x}")
            self._addresses[name] = address

    def enqueue(self, stream: int) -> None:
        """Start the work.

        Raises:
            EngineError: TensorRT's own reason.
        """
        if not self._context.execute_async_v3(stream):
            raise self._engine.failure("it cannot be run")

    def capturable(self, stream: int) -> bool:
        """Whether the work can become a CUDA graph; only TensorRT for RTX knows before it is tried."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or ask(stream)


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
