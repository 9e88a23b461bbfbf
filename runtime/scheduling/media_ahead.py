"""The media of waiting requests, loaded on CPU threads while others are answered."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..inputs.images import decoding_bytes
from ..inputs.video import Video
from ..media.ahead import DEFAULT_AHEAD_BYTES, fits
from ..preprocessing.sizes import Medium
from .preparation import MediaSources

_THREADS = min(4, os.cpu_count() or 1)
"""They take turns with the thread that steps: decoders of images and videos let go of Python's lock while they work."""

Load = Callable[[MediaSources], list[Medium]]


class Loading:
    """A request's media: for a thread, or for the caller.

    Attributes:
        ahead: they are for a thread.
        begun: a thread is at them or has been: they take memory.
        nbytes: what loading them takes at most, once it has been looked at (None where nobody knows, as of a video
            file); of their pixels, once a thread has loaded them.
        seconds: that the thread took; 0 without one.
    """

    def __init__(self, sources: MediaSources, ahead: bool) -> None:
        self.sources, self.ahead = sources, ahead
        self.begun = False
        self.nbytes: int | None = None
        self._measured = False
        self.seconds = 0.0
        self.future: Future[list[Medium] | None] | None = None

    @property
    def done(self) -> bool:
        """Whether a thread has had them."""
        return self.future is not None and self.future.done()

    def measure(self) -> None:
        """Look, once, at what loading takes: headers of files are read."""
        if not self._measured:
            self.nbytes = _loading_bytes(self.sources)
            self._measured = True

    @staticmethod
    def wait_for_any(loadings: Collection[Loading], seconds: float | None, *others: Future[None]) -> None:
        """Wait until the first of those on threads is loaded, or one of the others done, or so long."""
        futures: list[Future[Any]] = [loading.future for loading in loadings if loading.future is not None]
        wait([*futures, *others], seconds, FIRST_COMPLETED)


class MediaAhead:
    """Loads on a few threads, in the order of asking. They start with the first media and end with the object.

    Whether there is room for one more is looked at when it is asked for and again when a thread comes to it, which
    knows from the headers what it takes. What nobody knows counts as much as the largest of late, and until the first
    is known there is one a thread. Where nothing waits there is room for one of any size. Where there is none for one
    request, there is none for those that ask after it in the same pass.

    Args:
        load: called on any of the threads.
        overlap: False leaves all to the caller.
        most_bytes: of pixels that may wait.
    """

    def __init__(self, load: Load, overlap: bool, most_bytes: int = DEFAULT_AHEAD_BYTES) -> None:
        self._load, self._overlap, self._most_bytes = load, overlap, most_bytes
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._queued: list[Loading] = []  # given to threads, and not taken yet
        self._held: list[int] = []
        self._last = 0
        self._full = False

    def begin_pass(self, held: Sequence[int]) -> None:
        """Before the waiting requests are looked at, in their order: how many bytes each that is prepared holds."""
        with self._lock:
            self._last = max(filter(None, self._held), default=self._last)
            self._held = list(held)
            self._full = False

    def hold(self, nbytes: int) -> None:
        """One more request is prepared."""
        with self._lock:
            self._held.append(nbytes)

    def start(self, sources: MediaSources) -> Loading:
        """Begin with a request's media as soon as there is room.

        Text has none, and what lies on a GPU is ordered by the streams of the caller's thread: both are left to it.
        """
        media = [*sources.images, *sources.videos]
        loading = Loading(sources, self._overlap and bool(media) and not any(map(_on_gpu, media)))
        self._queue(loading)
        return loading

    def take(self, loading: Loading) -> list[Medium] | None:
        """The media; None while a thread is at them or there is no room. Raises what loading them raised."""
        if not loading.ahead:
            if loading.sources.images or loading.sources.videos:
                loading.measure()
                if not self._room(loading):
                    return None
            return self._load(loading.sources)
        if not loading.done:
            self._queue(loading)
            return None
        assert loading.future is not None
        self.drop(loading)
        media, loading.future = loading.future.result(), None
        if media is None:  # its turn came when there was no room
            self._queue(loading)
        return media

    def drop(self, loading: Loading) -> None:
        """Nobody wants it: it is not begun with any more; if it has begun, the media are dropped at their end."""
        if loading.future is not None:
            loading.future.cancel()
        with self._lock:
            if loading in self._queued:
                self._queued.remove(loading)

    def _queue(self, loading: Loading) -> None:
        """Give a thread what is for one and where there is room."""
        if not loading.ahead or loading.future is not None or not self._room(loading):
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="load-media")
        with self._lock:
            self._queued.append(loading)
            loading.future = self._threads.submit(self._load_in_turn, loading)

    def _room(self, loading: Loading) -> bool:
        """For one more, on the caller's thread."""
        with self._lock:
            self._full = self._full or not self._room_beside(self._queued, loading)
            return not self._full

    def _room_beside(self, others: Collection[Loading], loading: Loading) -> bool:
        waiting = [*self._held, *(other.nbytes or 0 for other in others if other.done)]
        busy = [other.nbytes for other in others if not other.done]
        largest = max([*waiting, self._last])
        if loading.nbytes is None and not largest:
            return len(busy) < _THREADS
        held = sum(waiting) + sum(largest if nbytes is None else nbytes for nbytes in busy)
        return fits(held, largest if loading.nbytes is None else loading.nbytes, self._most_bytes)

    def _load_in_turn(self, loading: Loading) -> list[Medium] | None:
        loading.measure()
        with self._lock:
            if not self._room_beside([other for other in self._queued if other.begun], loading):
                return None
            loading.begun = True
        began = time.perf_counter()
        try:
            media = self._load(loading.sources)
            loading.nbytes = sum(medium.nbytes for medium in media)
            return media
        finally:
            loading.seconds = time.perf_counter() - began

    def close(self) -> None:
        """End the threads, after the media that they have begun with; those that wait for one are cancelled."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
            self._queued.clear()


def _loading_bytes(sources: MediaSources) -> int | None:
    """Most memory that loading takes; None where one is a video file, whose frames nobody has counted."""
    total = sum(map(decoding_bytes, sources.images))
    for video in sources.videos:
        frames = video.frames if isinstance(video, Video) else video
        if isinstance(frames, (str, Path, bytes)):
            return None
        if isinstance(frames, Sequence):
            total += sum(map(decoding_bytes, frames))
        elif isinstance(frames, (np.ndarray, Tensor)):
            total += frames.nbytes
    return total


def _on_gpu(source: Any) -> bool:
    if isinstance(source, Tensor):
        return source.device.type != "cpu"
    if isinstance(source, Video):
        source = source.frames
    return isinstance(source, Sequence) and not isinstance(source, (str, bytes)) and any(map(_on_gpu, source))
