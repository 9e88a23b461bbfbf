"""The media of waiting requests, loaded on CPU threads while others are answered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor

from ..inputs.video import Video
from .preparation import LoadedMedia, MediaSources

_THREADS = min(4, os.cpu_count() or 1)
"""They take turns with the thread that steps: decoders of images and videos let go of Python's lock while they work."""

Load = Callable[[MediaSources], LoadedMedia]


class Loading:
    """A request's media: on a thread, or loaded by the caller when it asks for them.

    Attributes:
        ahead: they are on a thread.
        seconds: that the thread took; 0 without one.
    """

    def __init__(self, sources: MediaSources, load: Load, threads: ThreadPoolExecutor | None) -> None:
        self._sources, self._load = sources, load
        self.seconds = 0.0
        self._future: Future[LoadedMedia] | None = threads.submit(self._timed) if threads is not None else None

    @property
    def ahead(self) -> bool:
        return self._future is not None

    @property
    def done(self) -> bool:
        """Whether asking for them does not wait for a thread."""
        return self._future is None or self._future.done()

    def result(self) -> LoadedMedia:
        """The media; raises what loading them raised."""
        return self._load(self._sources) if self._future is None else self._future.result()

    def cancel(self) -> None:
        """Nobody wants them: they are not begun with any more; those that have begun are dropped at their end."""
        if self._future is not None:
            self._future.cancel()

    def _timed(self) -> LoadedMedia:
        began = time.perf_counter()
        try:
            return self._load(self._sources)
        finally:
            self.seconds = time.perf_counter() - began

    @staticmethod
    def wait_for_any(loadings: Collection[Loading], seconds: float | None, *others: Future[None]) -> None:
        """Wait until the first of those on threads is loaded, or one of the others done, or so long."""
        futures: list[Future[Any]] = [loading._future for loading in loadings if loading._future is not None]
        wait([*futures, *others], seconds, FIRST_COMPLETED)


class MediaAhead:
    """Loads on a few threads, in the order of asking. They start with the first media and end with the object.

    Args:
        load: called on any of the threads.
        overlap: False leaves all to the caller.
    """

    def __init__(self, load: Load, overlap: bool) -> None:
        self._load, self._overlap = load, overlap
        self._threads: ThreadPoolExecutor | None = None

    def start(self, sources: MediaSources) -> Loading:
        """Begin with a request's media.

        Text has none, and what lies on a GPU is ordered by the streams of the caller's thread: both are left to it.
        """
        media = [*sources.images, *sources.videos]
        if not self._overlap or not media or any(map(_on_gpu, media)):
            return Loading(sources, self._load, None)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="load-media")
        return Loading(sources, self._load, self._threads)

    def close(self) -> None:
        """End the threads, after the media that they have begun with; those that wait for one are cancelled."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None


def _on_gpu(source: Any) -> bool:
    if isinstance(source, Tensor):
        return source.device.type != "cpu"
    if isinstance(source, Video):
        source = source.frames
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes)) and any(map(_on_gpu, source))
