"""AdamW on FP32 master weights for a model whose own weights are BF16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.98)


class MasterWeights:
    """One flat FP32 vector of all weights, its optimizer and its moving average.

    The model's parameters become views of one flat vector, and so do their gradients, so that a step costs a handful
    of operations whatever the number of tensors. Vectors (norms, biases) are not decayed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, weight_decay: float, average: float) -> None:
        self.average = average
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in model.parameters():
            groups[parameter.dim() < 2].append(parameter)
        ordered = groups[0] + groups[1]
        self.master = torch.cat([p.detach().float().flatten() for p in ordered])
        self.weights = self.master.to(dtype)
        self.gradients = torch.zeros_like(self.weights)
        offset = 0
        for parameter in ordered:
            part = slice(offset, offset + parameter.numel())
            parameter.data = self.weights[part].view_as(parameter)
            parameter.grad = self.gradients[part].view_as(parameter)
            offset = part.stop
        decayed = sum(p.numel() for p in groups[0])
        self.moving = self.master.clone()
        self._parts = [nn.Parameter(self.master[:decayed]), nn.Parameter(self.master[decayed:])]
        self._adam = torch.optim.AdamW(
            [
                {"params": [self._parts[0]], "weight_decay": weight_decay},
                {"params": [self._parts[1]], "weight_decay": 0.0},
            ],
            betas=ADAM_BETAS,
            eps=1e-8,
            fused=True,
        )

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float, step: int) -> float:
        """Apply the gradients, averaged over all processes, and clear them; returns their norm before clipping."""
        gradient: Tensor = self.gradients.float()
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        norm = float(gradient.norm())
        gradient *= min(1.0, clip / (norm + 1e-6))
        decayed = self._parts[0].numel()
        self._parts[0].grad, self._parts[1].grad = gradient[:decayed], gradient[decayed:]
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self.gradients.zero_()
        self.weights.copy_(self.master)
        # Early on the average follows closely, so that it forgets the first, random weights.
        self.moving.lerp_(self.master, 1 - min(self.average, (1 + step) / (10 + step)))
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the model has the averaged weights."""
        self.weights.copy_(self.moving)
        try:
            yield
        finally:
            self.weights.copy_(self.master)

    def state_dict(self) -> dict[str, Any]:
        return {"master": self.master, "moving": self.moving, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.master.copy_(state["master"])
        self.moving.copy_(state["moving"])
        self.weights.copy_(self.master)
        self._adam.load_state_dict(state["adam"])
