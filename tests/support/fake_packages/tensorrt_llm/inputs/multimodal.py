from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class MultimodalParams:
    multimodal_input: Any = None
    multimodal_data: dict[str, Any] | None = field(default_factory=dict)
    multimodal_runtime: Any = None

    def to_handle(self, element):
        """Tensors become handles of shared memory; nothing else crosses to a worker process."""
        assert element == "multimodal_data"
        self.multimodal_data = _each_tensor(self.multimodal_data, _Handle)

    def to_tensor(self, element):
        """A worker's side: raises where a tensor came without ``to_handle``."""
        assert element == "multimodal_data"
        self.multimodal_data = _each_tensor(self.multimodal_data, _refuse, lambda handle: handle.tensor)


class _Handle:
    def __init__(self, tensor):
        assert tensor.device.type == "cpu"
        self.tensor = tensor.clone()


def _refuse(tensor):
    raise RuntimeError("a tensor cannot be sent to another process; it is no handle")


def _each_tensor(value, on_tensor, on_handle=lambda handle: handle):
    if isinstance(value, dict):
        return {key: _each_tensor(item, on_tensor, on_handle) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return on_tensor(value)
    return on_handle(value) if isinstance(value, _Handle) else value
