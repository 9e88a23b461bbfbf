"""An image or a video from where it is loaded to where it is embedded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .sizes import MediaSize


@dataclass(frozen=True, eq=False)
class Medium:
    """An image or a video, by its pixels, which were checked when they were loaded, or by its embedding.

    Attributes:
        size: what it is resized to.
        frames: ``[3, H, W]`` each, uint8 or float32 in 0..1: one of an image, all that are kept of a video; none where
            it is embedded.
        embeds: ``[tokens, C]`` on the engine's device, if it is embedded.
        key: names its content and its size, 16 bytes; empty where no cache asks for it.
        note: says so where it did not fit the engines as it was.
        nbytes: of its pixels; an embedding is the cache's.
    """

    size: MediaSize
    frames: Sequence[Tensor] = ()
    embeds: Tensor | None = None
    key: bytes = b""
    note: str | None = None
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(frame.nbytes for frame in self.frames))

    @property
    def is_video(self) -> bool:
        return self.size.frames is not None
