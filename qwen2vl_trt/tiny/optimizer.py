"""Muon and AdamW on FP32 master weights for a model whose own weights are BF16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.98)
MUON_MOMENTUM = 0.95
MUON_RATE = 2.0
"""Muon's learning rate as a multiple of AdamW's, both counted by the size of one weight's update."""


def _optimizer_of(name: str, parameter: nn.Parameter) -> int:
    """0: Muon, for the matrices of attention and MLP; 1: AdamW with decay; 2: AdamW without, for vectors."""
    if parameter.dim() < 2:
        return 2
    return 0 if "blocks." in name or "layers." in name else 1


class MasterWeights:
    """One flat FP32 vector of all weights, its optimizers and its moving average.

    The model's parameters become views of one flat vector, and so do their gradients, so that AdamW costs a handful of
    operations whatever the number of tensors.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, weight_decay: float, average: float) -> None:
        self.average = average
        groups: tuple[list[nn.Parameter], ...] = ([], [], [])
        for name, parameter in model.named_parameters():
            groups[_optimizer_of(name, parameter)].append(parameter)
        ordered = groups[0] + groups[1] + groups[2]
        self.master = torch.cat([p.detach().float().flatten() for p in ordered])
        self.weights = self.master.to(dtype)
        self.gradients = torch.zeros_like(self.weights)
        self._slices = []
        offset = 0
        for parameter in ordered:
            part = slice(offset, offset + parameter.numel())
            parameter.data = self.weights[part].view_as(parameter)
            parameter.grad = self.gradients[part].view_as(parameter)
            self._slices.append(part)
            offset = part.stop
        self.moving = self.master.clone()
        self._matrices = [
            nn.Parameter(self.master[s].view_as(p)) for s, p in zip(self._slices, groups[0], strict=False)
        ]
        first, second = (sum(p.numel() for p in group) for group in groups[:2])
        self._bounds = (slice(first, first + second), slice(first + second, None))
        self._rest = [nn.Parameter(self.master[bounds]) for bounds in self._bounds]
        self._muon = torch.optim.Muon(
            self._matrices, weight_decay=weight_decay, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(
            [
                {"params": [self._rest[0]], "weight_decay": weight_decay},
                {"params": [self._rest[1]], "weight_decay": 0.0},
            ],
            betas=ADAM_BETAS,
            eps=1e-8,
            fused=True,
        )

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float, step: int) -> float:
        """Apply the gradients and clear them; returns their norm before clipping."""
        gradient: Tensor = self.gradients.float()
        norm = float(gradient.norm())
        gradient *= min(1.0, clip / (norm + 1e-6))
        for matrix, part in zip(self._matrices, self._slices, strict=False):
            matrix.grad = gradient[part].view_as(matrix)
        for rest, part in zip(self._rest, self._bounds, strict=True):
            rest.grad = gradient[part]
        for group in self._muon.param_groups:
            group["lr"] = MUON_RATE * learning_rate
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._muon.step()
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
        """What :meth:`load_state_dict` needs."""
        return {
            "master": self.master,
            "moving": self.moving,
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.master.copy_(state["master"])
        self.moving.copy_(state["moving"])
        self.weights.copy_(self.master)
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
