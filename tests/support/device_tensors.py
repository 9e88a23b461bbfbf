"""Tensors that stand for a GPU's on a machine without one, and a mode that counts when the host would wait for it.

A device tensor says that it is on the meta device and holds a CPU tensor, on which everything is computed. What makes a
CUDA program wait is counted: values read by the host (``item``, ``tolist``, ``bool``, copies to the CPU), shapes that
depend on values (masks as indices), and copies from memory that is not pinned or that are told to block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
META = torch.device("meta")
_READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
_SHAPED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}


class DeviceTensor(Tensor):
    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=META, storage_offset=held.storage_offset()
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("a GPU's tensor has no numpy view")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} on a device tensor outside of the mode")


class _Factories(TorchFunctionMode):
    """``torch.tensor`` copies where no dispatch mode sees it."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == META:
            self.counted.seen.append("torch.tensor from the host")
            return DeviceTensor(torch.tensor(*args, **kwargs | {"device": "cpu"}))
        if function is Tensor.new_tensor and isinstance(args[0], DeviceTensor):
            self.counted.seen.append("new_tensor from the host")
            return DeviceTensor(torch.tensor(*args[1:], dtype=args[0].dtype))
        return function(*args, **kwargs)


class Synchronisations(TorchDispatchMode):
    """Runs operations on device tensors; ``seen`` names each that makes the host wait."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.pinned = set()

    def __enter__(self):
        self._factories = _Factories(self)
        self._factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(x, DeviceTensor) for x in inputs)
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        if on_device:
            self._count(function, args, kwargs, to_host)
        elif function is aten._to_copy.default and target is not None and torch.device(target) == META:
            self._count_upload(function, args[0], kwargs.get("non_blocking", False))
        if target is not None:
            on_device = not to_host
            kwargs["device"] = torch.device("cpu")
        if function is aten.copy_.default:
            on_device = isinstance(args[0], DeviceTensor)
        mutated = args[0] if args and isinstance(args[0], Tensor) else None
        bare_args, bare_kwargs = tree_map_only(DeviceTensor, lambda x: x.held, (args, kwargs))
        result = function(*bare_args, **bare_kwargs)
        if function._schema.name.endswith("_") and isinstance(mutated, DeviceTensor):
            return mutated
        return tree_map_only(Tensor, DeviceTensor, result) if on_device else result

    def _count(self, function, args, kwargs, to_host):
        masked = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # A host's index of a device's tensor is copied there first, from memory that is not pinned.
        foreign = function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            index is not None and not isinstance(index, DeviceTensor) for index in args[1]
        )
        if (
            function in _READS
            or function in _SHAPED_BY_VALUES
            or masked
            or foreign
            or (function is aten._to_copy.default and to_host)
        ):
            self.seen.append(str(function))
        elif function is aten.copy_.default:
            if not isinstance(args[0], DeviceTensor):
                self.seen.append(str(function))
            elif not isinstance(args[1], DeviceTensor):
                self._count_upload(function, args[1], args[2] if len(args) > 2 else False)

    def _count_upload(self, function, source, non_blocking):
        if not non_blocking or source.data_ptr() not in self.pinned:
            self.seen.append(f"{function} from the host")


def pin(mode):
    """What stands for ``Tensor.pin_memory``."""

    def pin_memory(tensor):
        copy = tensor.clone()
        mode.pinned.add(copy.data_ptr())
        mode.keep = [*getattr(mode, "keep", []), copy]  # an address is given out once
        return copy

    return pin_memory
