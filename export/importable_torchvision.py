"""Make a torchvision built for CUDA importable beside a PyTorch for the CPU."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import torch


@cache
def allow_torchvision() -> torch.library.Library | None:
    """Declare the two operators without which that torchvision's import fails.

    Transformers imports torchvision where it finds one, and its processor, the reference for pixels, needs it. Its own
    operators cannot load there; its transforms, which are plain PyTorch, need none of them. Where torchvision is
    missing, or imports as it is, nothing is declared.
    """
    with suppress(ImportError):
        try:
            import torchvision  # noqa: F401
        except (RuntimeError, AttributeError):
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return library  # the declarations live as long as this object
    return None
