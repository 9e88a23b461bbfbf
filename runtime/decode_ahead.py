"""Images decoded on CPU threads while the engine works on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen2vl_trt.errors import MediaError

from .feature_sources import IMAGE_FAULTS, FeatureSource
from .image_listing import ImageFile
from .media import LoadedImage

_AHEAD_BYTES = 1 << 30
"""Decoded pixels that may wait for the engine; one not decoded yet counts as much as the largest of late."""


@dataclass(frozen=True)
class Batching:
    """Bounds of what is held at once.

    Attributes:
        max_batch_size: most images in an engine call.
        max_tokens: most merged image tokens in one, unless a single image has more.
        merge_unit: patches to a token.
        workers: threads that decode.
    """

    max_batch_size: int
    max_tokens: int
    merge_unit: int
    workers: int

    def tokens(self, image: LoadedImage) -> int:
        return image.grid[1] * image.grid[2] // self.merge_unit

    @property
    def ahead(self) -> int:
        """Most images decoded or being decoded: a batch for the engine, and the next."""
        return 2 * max(self.max_batch_size, self.workers)


_Decoded = tuple[str, LoadedImage | Exception]


@contextmanager
def decode_ahead(
    source: FeatureSource, images: Iterator[ImageFile], batching: Batching
) -> Iterator[Iterator[_Decoded]]:
    """Key and pixels of each image in order, or what is wrong with it; threads work ahead within the bounds."""

    def load(number: int, image: ImageFile) -> LoadedImage | Exception:
        try:
            image.key.encode()  # the names of a shard's tensors are Unicode
            return source.load(image.path, f"image {number}")
        except UnicodeEncodeError:
            return MediaError(f"image {number} ({image.path!r}): its name is not valid UTF-8; rename it")
        except IMAGE_FAULTS as error:
            return error

    def items() -> Iterator[_Decoded]:
        ahead: deque[tuple[str, Future[LoadedImage | Exception]]] = deque()
        size = 0  # bytes of the largest image of late
        numbered = enumerate(images, start=1)
        while True:
            ready = [image.pixels.nbytes for image in _results(ahead) if isinstance(image, LoadedImage)]
            size = max(ready, default=size)
            while not ahead or (
                len(ahead) < batching.ahead and sum(ready) + (len(ahead) - len(ready) + 1) * size <= _AHEAD_BYTES
            ):
                number, image = next(numbered, (0, None))
                if image is None:
                    break
                ahead.append((image.key, executor.submit(load, number, image)))
            if not ahead:
                return
            key, future = ahead.popleft()
            yield key, future.result()

    executor = ThreadPoolExecutor(batching.workers, thread_name_prefix="decode")
    try:
        yield items()
    finally:
        executor.shutdown(cancel_futures=True)


def _results(ahead: Iterable[tuple[str, Future[Any]]]) -> Iterator[Any]:
    return (future.result() for _, future in ahead if future.done())
