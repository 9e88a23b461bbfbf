"""The runner is tested over a fake runtime: each name that the fake has, the real bindings have too."""

import inspect
import re
from importlib import import_module

import pytest

from qwen2vl_trt.runtime.backends.tensorrt_engine import CudaDevice
from tests.support import fake_tensorrt

CLASSES = [
    fake_tensorrt.Runtime,
    fake_tensorrt.ICudaEngine,
    fake_tensorrt.IExecutionContext,
    fake_tensorrt.IProfiler,
    fake_tensorrt.IRuntimeConfig,
    fake_tensorrt.Refitter,
]
ENUMS = [
    fake_tensorrt.DataType,
    fake_tensorrt.TensorIOMode,
    fake_tensorrt.ExecutionContextAllocationStrategy,
    fake_tensorrt.DynamicShapesKernelSpecializationStrategy,
    fake_tensorrt.ProfilingVerbosity,
]


RTX_ALONE = {"is_stream_capturable", "dynamic_shapes_kernel_specialization_strategy"}
"""The runner asks for these before it uses them."""


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def trt(request):
    try:
        return import_module(request.param)
    except ImportError as error:
        pytest.skip(f"{request.param} is not here: {error}")


def names(cls):
    """Public names of a class, those set in its constructor too."""
    assigned = re.findall(r"self\.([a-z]\w*)(?=[ ,].*=)", inspect.getsource(cls))
    return {name for name in (*vars(cls), *assigned) if not name.startswith("_")}


def expected(trt, cls):
    return names(cls) if trt.__name__ == "tensorrt_rtx" else names(cls) - RTX_ALONE


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_methods_and_attributes(trt, cls):
    assert expected(trt, cls)
    assert not [name for name in expected(trt, cls) if not hasattr(getattr(trt, cls.__name__), name)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_stand_ins_arguments_are_tensorrts(trt, cls):
    """By name and order, as the bindings' signatures have them."""
    for name, method in vars(cls).items():
        if name not in expected(trt, cls) or not inspect.isfunction(method):
            continue
        ours = list(inspect.signature(method).parameters)[1:]
        said = re.sub("<.*?>", "", getattr(trt, cls.__name__).__dict__[name].__doc__)
        lines = [line for line in said.splitlines() if f"{name}(self" in line]
        assert ours in [re.findall(r"(\w+): ", line)[1:] for line in lines], name


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_the_stand_ins_enumerations_are_tensorrts(trt, enum):
    if enum is fake_tensorrt.DynamicShapesKernelSpecializationStrategy and trt.__name__ == "tensorrt":
        assert not hasattr(trt, enum.__name__), "the runner takes it for TensorRT for RTX"
        return
    real = getattr(trt, enum.__name__)
    assert not [member.name for member in enum if not hasattr(real, member.name)]


def test_the_stand_ins_device_is_the_runners():
    """What the runner asks of the CPU here, it can ask of a GPU."""
    knobs = {"capturing", "free", "captures"}
    assert names(fake_tensorrt.CpuDevice) - knobs < names(CudaDevice)
    for name in ("__init__", "pinned", "capture", "active", "free_memory"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (fake_tensorrt.CpuDevice, CudaDevice))
        assert list(ours.parameters) == list(theirs.parameters)


def test_a_mapped_file_is_taken_as_a_plan(trt, tmp_path):
    """Without a GPU TensorRT refuses it for that, not for being no bytes."""
    import mmap

    from qwen2vl_trt.engines.tensorrt_callbacks import tensorrt_log

    path = tmp_path / "plan"
    path.write_bytes(bytes(10_000))
    log = tensorrt_log(trt)
    log.clear()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        assert trt.Runtime(log).deserialize_cuda_engine(plan) is None
    assert log.errors
