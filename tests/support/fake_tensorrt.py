"""TensorRT's runtime API over ONNX Runtime, on the CPU: what the runner binds, aliases and enqueues is really computed.

Names, arguments and demands are those of the real bindings (``tests/runtime/backends/test_tensorrt_api.py`` compares
them): a context runs only in a profile, with every shape set and within it, every tensor at an aligned address, memory
for the shapes it has, and an aliased output where its input is. Addresses are of CPU tensors;
:mod:`tests.support.fake_cuda` checks in which order streams read and write them.
"""

import ctypes
import json
from contextlib import contextmanager
from enum import Enum, IntEnum
from math import prod
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch

from qwen2vl_trt.runtime.backends.tensorrt_engine import CudaDevice
from tests.support.fake_cuda import ALIGNMENT, FakeCuda

VERSION = "11.4.0.106"


class DataType(Enum):
    FLOAT, HALF, BF16, INT32, INT64 = range(5)


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class ProfilingVerbosity(Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


_DTYPES = {
    onnx.TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    onnx.TensorProto.FLOAT16: (DataType.HALF, np.float16),
    onnx.TensorProto.BFLOAT16: (DataType.BF16, ml_dtypes.bfloat16),
    onnx.TensorProto.INT64: (DataType.INT64, np.int64),
}


def write_plan(path, graph, profiles, stripped=False):
    """A plan that this runtime loads: where its graph is, and the ranges of each profile."""
    plan = {"graph": str(graph), "profiles": profiles, "stripped": stripped}
    path.write_text(json.dumps(plan))


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self.logger.log(ILogger.Severity.ERROR, "assertion plan->header.magicTag == PLAN_MAGIC failed")
            return None
        return ICudaEngine(plan, self.logger)


class ICudaEngine:
    """Notes what a runner does with it, in attributes that begin with an underscore."""

    def __init__(self, plan, logger):
        graph = onnx.load(plan["graph"], load_external_data=False).graph
        self._path, self._profiles, self._logger = Path(plan["graph"]), plan["profiles"], logger
        self._inputs = {value.name: value for value in graph.input}
        self._outputs = {value.name: value for value in graph.output}
        self._contexts, self._weights = [], {} if plan["stripped"] else None
        self._session = None if plan["stripped"] else _session(self._path)
        self.num_optimization_profiles = len(self._profiles)
        self.num_io_tensors = len(self._inputs) + len(self._outputs)
        self.streamable_weights_size, self._scratch = 0, 0
        self._budgets = []

    def get_tensor_name(self, index):
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _DTYPES[self._value(name).type.tensor_type.elem_type][0]

    def get_tensor_shape(self, name):
        return [-1 if isinstance(dim, str) else dim for dim in self._dims(name)]

    def get_tensor_profile_shape(self, name, profile_index):
        ranges = self._profiles[profile_index]
        return [tuple(ranges[dim][i] if isinstance(dim, str) else dim for dim in self._dims(name)) for i in range(3)]

    def get_aliased_input_tensor(self, name):
        return name.removeprefix("new_") if name.startswith("new_") else None

    def get_device_memory_size_for_profile_v2(self, profile_index):
        shapes = (self.get_tensor_profile_shape(name, profile_index)[2] for name in self._inputs)
        return _activations(shapes) + (self._scratch if self._streams else 0)

    @property
    def _streams(self):
        return bool(self._budgets) and self._budgets[-1] < self.streamable_weights_size

    @property
    def weight_streaming_budget_v2(self):
        return self._budgets[-1]

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget):
        assert not self._contexts, "the budget comes before the contexts"
        self._budgets.append(budget)

    def create_execution_context(self, strategy):
        if isinstance(strategy, IRuntimeConfig):
            strategy = strategy._strategy
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._contexts.append(IExecutionContext(self))
        return self._contexts[-1]

    def create_runtime_config(self):
        return IRuntimeConfig()

    def _value(self, name):
        return self._inputs.get(name) or self._outputs[name]

    def _dims(self, name):
        return [dim.dim_param or dim.dim_value for dim in self._value(name).type.tensor_type.shape.dim]

    def _numpy(self, name):
        return _DTYPES[self._value(name).type.tensor_type.elem_type][1]


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy


class IProfiler:
    def report_layer_time(self, layer_name, ms):
        raise NotImplementedError


class IExecutionContext:
    profiler = None
    nvtx_verbosity = ProfilingVerbosity.DETAILED

    def __init__(self, engine):
        self._engine, self._profile, self._stream = engine, None, None
        self._shapes, self._addresses, self._memory, self._needed = {}, {}, None, None
        self._runs, self._ready = 0, False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._profile, self._shapes, self._memory = profile_index, {}, None
        self._stream, self._ready = stream_handle, False
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(least) or not all(low <= size <= high for low, size, high in zip(least, shape, most)):
            return self._fail(f"{name} {shape} is outside profile {self._profile}")
        self._shapes[name], self._memory, self._needed, self._ready = tuple(shape), None, None, False
        return True

    def infer_shapes(self):
        sizes = {}
        for name, shape in self._shapes.items():
            for dim, size in zip(self._engine._dims(name), shape):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise RuntimeError(f"{dim} is {size} and {sizes[dim]}")
        self._sizes = sizes
        return [name for name in self._engine._inputs if name not in self._shapes]

    def update_device_memory_size_for_shapes(self):
        assert not self.infer_shapes()
        self._needed = _activations(self._shapes.values())
        return self._needed

    def set_device_memory(self, memory, size):
        assert self._needed is not None, "the size must be asked for after the shapes"
        assert size >= self._needed
        assert memory % ALIGNMENT == 0, "memory for activations is not aligned"
        self._memory = memory

    def get_tensor_shape(self, name):
        return [self._sizes[dim] if isinstance(dim, str) else dim for dim in self._engine._dims(name)]

    def set_tensor_address(self, name, memory):
        if not memory or not self._engine._value(name):
            return False
        if memory % ALIGNMENT:
            return self._fail(f"{name} lies at {memory:#x}, which is no multiple of {ALIGNMENT}")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream_handle):
        engine = self._engine
        if engine._session is None:
            return self._fail("the engine has no weights")
        if self._memory is None:
            return self._fail("no memory for activations")
        unbound = [name for name in (*engine._inputs, *engine._outputs) if name not in self._addresses]
        if unbound:
            return self._fail(f"{unbound[0]} has no address")
        for name in engine._outputs:
            source = engine.get_aliased_input_tensor(name)
            if source and self._addresses[source] != self._addresses[name]:
                return self._fail(f"{name} is not where {source} is")
        if stream_handle != self._stream:
            return self._fail("the profile was chosen on another stream")
        if CpuDevice.capturing is not None and engine._streams:
            return self._fail("streamed weights cannot be captured")
        if CpuDevice.capturing is not None and not self._ready:
            return self._fail("nothing was enqueued with these shapes before the capture")
        names = (*engine._inputs, *engine._outputs)
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in names}
        work = _Work(self, dict(self._addresses), shapes, self._memory)
        assert self.profiler is None or CpuDevice.capturing is None, "a captured layer has no time of its own"
        if CpuDevice.capturing is not None:
            CpuDevice.capturing.append(work)
        else:
            work()
            self._ready = True
        return True

    def _fail(self, message):
        self._engine._logger.log(ILogger.Severity.ERROR, message)
        return False


class _Work:
    """What was enqueued: addresses and shapes as they were then, whatever the context is told later."""

    def __init__(self, context, addresses, shapes, memory):
        self.context, self.addresses, self.shapes, self.memory = context, addresses, shapes, memory

    def __call__(self):
        engine, cuda = self.context._engine, FakeCuda.active
        assert cuda.current.cuda_stream == self.context._stream, "the stream is not the current one"
        for name in engine._inputs:
            cuda.read(self.addresses[name], name)
        for name in engine._outputs:
            cuda.write(self.addresses[name], name)
        cuda.write(self.memory, "memory for activations")
        arrays = {
            name: _at(address, self.shapes[name], engine._numpy(name)) for name, address in self.addresses.items()
        }
        outputs = list(engine._outputs)
        results = engine._session.run(outputs, {name: arrays[name] for name in engine._inputs})
        for name, result in zip(outputs, results):
            arrays[name][...] = result
            if self.context.profiler is not None:
                self.context.profiler.report_layer_time(f"layer of {name}", 0.5)
        self.context._runs += 1


class Refitter:
    def __init__(self, engine, logger):
        self._engine, self._logger, self._set = engine, logger, {}
        graph = onnx.load(engine._path, load_external_data=False).graph
        self._wanted = {
            value.name: value for value in graph.initializer if value.data_location == onnx.TensorProto.EXTERNAL
        }

    def get_all_weights(self):
        return list(self._wanted)

    def get_weights_prototype(self, weights_name):
        value = self._wanted[weights_name]
        dtype, numpy = _DTYPES[value.data_type]
        count = prod(value.dims)
        return SimpleNamespace(dtype=dtype, size=count, nbytes=count * np.dtype(numpy).itemsize)

    def set_named_weights(self, name, weights):
        numpy = next(numpy for dtype, numpy in _DTYPES.values() if dtype is weights.dtype)
        self._set[name] = _at(weights.address, (weights.size,), numpy)
        return True

    def get_missing_weights(self):
        return [name for name in self._wanted if name not in self._set]

    def refit_cuda_engine(self):
        self._engine._session = _session(self._engine._path)
        self._engine._weights = {name: array.copy() for name, array in self._set.items()}
        return True


class Weights:
    def __init__(self, dtype, address, size):
        self.dtype, self.address, self.size = dtype, address, size


def module(name="tensorrt", version=VERSION):
    """What ``import tensorrt`` gives; with the differences of TensorRT for RTX under its name."""
    classes = (
        DataType,
        TensorIOMode,
        ExecutionContextAllocationStrategy,
        ProfilingVerbosity,
        ILogger,
        IProfiler,
        Runtime,
        Refitter,
        Weights,
    )
    attributes = {cls.__name__: cls for cls in classes} | {"__name__": name, "__version__": version}
    if name == "tensorrt_rtx":
        attributes["DynamicShapesKernelSpecializationStrategy"] = DynamicShapesKernelSpecializationStrategy
    return type("Module", (), attributes)


class CpuDevice(CudaDevice):
    """In the place of :class:`qwen2vl_trt.runtime.backends.tensorrt_engine.CudaDevice`, within a :class:`FakeCuda`."""

    name, compute_capability = "a GPU", "8.9"
    capturing = None
    free = 10**10
    captures = True

    def __init__(self, device, priority=0):
        super().__init__(torch.device("cuda"), priority)
        self.torch_device = device

    def free_memory(self):
        return self.free

    def pinned(self, tensor):
        return tensor.contiguous()

    @contextmanager
    def active(self):
        yield

    def capture(self, enqueue):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        CpuDevice.capturing = works = []
        try:
            enqueue(self._stream.cuda_stream)
        finally:
            CpuDevice.capturing = None
        return lambda: [work() for work in works]


def _session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # it copies the caches, and warns of that
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _at(address, shape, dtype):
    size = prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def _activations(shapes):
    """Any number that grows with the shapes."""
    return sum(prod(shape) for shape in shapes)
