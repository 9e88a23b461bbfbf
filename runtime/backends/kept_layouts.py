"""What a vision runner makes of a batch's layout on its device, kept for layouts that come again.

Index tensors depend on the sizes of the images alone, and the same sizes come again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from qwen2vl_trt.windows import WindowLayout

_LAYOUTS = 64
"""Those used last: a few megabytes each at most."""

Indices = TypeVar("Indices")


def keep_layouts(place: Callable[[WindowLayout], Indices]) -> Callable[[WindowLayout], Indices]:
    """``place``, called once for each of the layouts that are kept."""
    return lru_cache(maxsize=_LAYOUTS)(place)
