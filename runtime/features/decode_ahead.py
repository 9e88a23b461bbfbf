"""Images decoded on CPU threads while the engine works on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..inputs.image_listing import ImageFile
from ..media.ahead import DEFAULT_AHEAD_BYTES, room_for_another
from ..media.embedder import LoadedImage
from .sources import IMAGE_FAULTS, FeatureSource


@dataclass(frozen=True)
class Batching:
    """Bounds of what is held at once.

    Attributes:
        max_batch_size: most images in an engine call.
        max_tokens: most merged image tokens in one, unless a single image has more.
        workers: threads that decode.
    """

    max_batch_size: int
    max_tokens: int
    workers: int

    @property
    def ahead(self) -> int:
        """Most images decoded or being decoded: a batch for the engine, and the next."""
        return 2 * max(self.max_batch_size, self.workers)


_Decoded = tuple[str, LoadedImage | Exception]


@contextmanager
def decode_ahead(
    source: FeatureSource, images: Iterator[tuple[int, ImageFile]], batching: Batching
) -> Iterator[Iterator[_Decoded]]:
    """Decode images in order on threads that work ahead within the bounds.

    Args:
        images: each with the number that error messages give it.

    Yields:
        An iterator over each image's key and its pixels, or what is wrong with it.
    """

    def load(number: int, image: ImageFile) -> LoadedImage | Exception:
        try:
            return source.load(image.path, f"image {number}")
        except IMAGE_FAULTS as error:
            return error

    def items() -> Iterator[_Decoded]:
        ahead: deque[tuple[str, Future[LoadedImage | Exception]]] = deque()
        last = 0  # bytes of the last image
        while True:
            ready = [image.nbytes for image in _done(ahead) if isinstance(image, LoadedImage)]
            while not ahead or (
                len(ahead) < batching.ahead
                and room_for_another(ready, len(ahead) - len(ready), last, batching.workers, DEFAULT_AHEAD_BYTES)
            ):
                following = next(images, None)
                if following is None:
                    break
                number, file = following
                ahead.append((file.key, executor.submit(load, number, file)))
            if not ahead:
                return
            key, future = ahead.popleft()
            image = future.result()
            last = image.nbytes if isinstance(image, LoadedImage) else last
            yield key, image

    executor = ThreadPoolExecutor(batching.workers, thread_name_prefix="decode")
    try:
        yield items()
    finally:
        executor.shutdown(cancel_futures=True)


def _done(ahead: Iterable[tuple[str, Future[Any]]]) -> Iterator[Any]:
    return (future.result() for _, future in ahead if future.done())
