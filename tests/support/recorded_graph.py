"""Stands in for CUDA graphs on the CPU: what a function enqueues is recorded and replayed, operator by operator.

Like a CUDA graph it replays the same operators on the same memory and runs no Python: a number that the host put into
a captured step stays what it was, and shows.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    current = None

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        _Recorder.current = self
        return super().__enter__()

    def __exit__(self, *error):
        _Recorder.current = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host waits for a number")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output


def opaque(function):
    """A compiled function as a recording sees it: one launch, for what it enqueues goes past PyTorch's operators.

    Left alone, PyTorch would run it uncompiled while operators are recorded.
    """

    def call(*args):
        recorder = _Recorder.current
        if recorder is None:
            return function(*args)
        with _disable_current_modes():
            output = function(*args)
        recorder.calls.append((function, args, {}, output))
        return output

    return call


class RecordedGraphs:
    """A ``Capture`` of :mod:`qwen2vl_trt.runtime.backends.torch_graphs` that counts what it did."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, body):
        with _Recorder() as recorder:
            body()
        self.captures += 1

        @torch.no_grad()
        def replay():
            self.replays += 1
            for func, args, kwargs, output in recorder.calls:
                for kept, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs))):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)

        return replay
