"""What the TensorRT runner asks of a GPU. Tests put the CPU in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qwen2vl_trt.errors import EngineError

from .tensorrt_tensors import ALIGNMENT


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
