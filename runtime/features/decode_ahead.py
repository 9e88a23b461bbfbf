"""Images decoded on CPU threads while the engine works on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from ..inputs.image_listing import ImageFile
from ..media.ahead import DEFAULT_AHEAD_BYTES, Admission
from ..preprocessing.sizes import Medium
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


_Decoded = tuple[str, Medium | Exception]


@contextmanager
def decode_ahead(
    source: FeatureSource, images: Iterator[tuple[int, ImageFile]], batching: Batching
) -> Iterator[Iterator[_Decoded]]:
    """Decode images in order on threads that work ahead within the bounds, that of their bytes included.

    An image counts until the caller has let go of it.

    Args:
        images: each with the number that error messages give it.

    Yields:
        An iterator over each image's key and its pixels, or what is wrong with it.
    """
    admission = Admission(DEFAULT_AHEAD_BYTES)

    def load(turn: int, number: int, image: ImageFile) -> Medium | Exception:
        loaded: Medium | Exception
        try:
            loaded = source.load(image.path, f"image {number}", lambda nbytes: admission.admit(turn, nbytes))
        except IMAGE_FAULTS as error:
            loaded = error
        finally:
            admission.admit(turn, 0)  # those behind it wait for its turn to be over
        admission.hold(turn, loaded.nbytes if isinstance(loaded, Medium) else 0)
        return loaded

    def items() -> Iterator[_Decoded]:
        ahead: deque[tuple[int, str, Future[Medium | Exception]]] = deque()
        turns = count()
        while True:
            while len(ahead) < batching.ahead:
                following = next(images, None)
                if following is None:
                    break
                turn, (number, file) = next(turns), following
                ahead.append((turn, file.key, executor.submit(load, turn, number, file)))
            if not ahead:
                return
            turn, key, future = ahead.popleft()
            image = future.result()
            if isinstance(image, Medium):
                admission.hand_over(turn, image)
            yield key, image

    executor = ThreadPoolExecutor(batching.workers, thread_name_prefix="decode")
    try:
        yield items()
    finally:
        admission.close()
        executor.shutdown(cancel_futures=True)
