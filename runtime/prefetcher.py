"""Images and videos loaded on CPU threads before they are needed, within a number of bytes."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from .options import DEFAULT_PREFETCH_BYTES
from .preprocessing.sizes import Medium


class Job:
    """Media that are loaded together; made by :meth:`Prefetcher.submit`.

    Attributes:
        on_thread: whether a thread loads them, or :meth:`Prefetcher.result`.
        future: of the media.
        seconds: that loading took, the wait for memory not included.
    """

    def __init__(self, load: Callable[[], list[Medium]], size: Callable[[], int | None], on_thread: bool) -> None:
        self.load, self.size, self.on_thread = load, size, on_thread
        self.future: Future[list[Medium]] = Future()
        self.seconds = 0.0
        self.nbytes: int | None = None  # that loading takes; of the pixels, once they are loaded
        self.measured = self.loaded = self.dropped = False


class Prefetcher:
    """Loads media in the order of :meth:`submit`, on threads that start with the first and end with the object.

    A job begins after all before it, once a thread is free and its bytes fit beside those of the jobs that are being
    loaded or wait; where there are none of those, a job of any size begins. Media that were handed over count while
    they live, but where nothing else is held a job begins whatever they take: a consumer that waits for the next media
    may still hold the last. An unknown size counts as the largest that waits, or else the last; until a size is known,
    as nothing. Threads do not wait for memory, so a program ends whatever is queued.

    Args:
        threads: how many load; decoders release Python's lock while they work.
        most_bytes: of all jobs together.
        name: of the threads.
    """

    def __init__(self, threads: int, most_bytes: int = DEFAULT_PREFETCH_BYTES, name: str = "prefetch") -> None:
        self._threads, self._most_bytes, self._name = threads, most_bytes, name
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()
        self._queued: list[Job] = []  # not begun, in order
        self._held: list[Job] = []  # begun, and not handed over
        self._handed_over = 0  # bytes
        self._freed: deque[int] = deque()  # bytes; a finalizer may run anywhere, so it takes no lock
        self._last = 0  # bytes of the job that was loaded last

    def submit(self, load: Callable[[], list[Medium]], size: Callable[[], int | None], on_thread: bool = True) -> Job:
        """Queue a job behind the others.

        Args:
            load: gives the media; what it raises, the job raises.
            size: bytes that loading takes at most, None where nobody knows, as of a video file; called before ``load``,
                and only on threads.
            on_thread: False leaves it to :meth:`result`.
        """
        job = Job(load, size, on_thread)
        with self._lock:
            self._queued.append(job)
            if on_thread:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix=self._name)
                self._executor.submit(self._measure, job)
        return job

    def result(self, job: Job) -> list[Medium] | None:
        """The media, or None while they cannot be had; raises what loading them raised.

        A job that is not for a thread is loaded here, once it can begin.
        """
        if not job.on_thread and not job.future.done():
            with self._lock:
                if self._queued[0] is not job or not self._fits(None):
                    return None
                self._begin(job)
            self._run(job)
        return job.future.result() if job.future.done() else None

    def wait(self, jobs: Collection[Job], seconds: float | None, interrupt: Future[None]) -> None:
        """Wait until one of the jobs on threads has ended, for so long at most, or for the interrupt.

        The end of a dropped job ends the wait too: it may have kept out a job that is not for a thread.
        """
        futures: list[Future[Any]] = [job.future for job in jobs if job.on_thread]
        with self._lock:
            futures += [job.future for job in self._held if job.dropped]
        wait([*futures, interrupt], seconds, FIRST_COMPLETED)

    def hand_over(self, job: Job, media: Collection[Medium]) -> None:
        """The caller takes over the media of a job; they count as long as they live."""
        with self._lock:
            self._handed_over += sum(medium.nbytes for medium in media)
        for medium in media:
            weakref.finalize(medium, self._freed.append, medium.nbytes)
        self.drop(job)

    def drop(self, *jobs: Job) -> None:
        """Nobody waits for these jobs: they do not begin; of those that have begun the media are dropped at the end."""
        with self._lock:
            for job in jobs:
                job.dropped = True
                if job.future.cancel() or job.future.done():
                    self._remove(job)
            self._begin_next()

    def close(self) -> None:
        """Drop all jobs and wait for those that have begun. A later job starts new threads."""
        with self._lock:
            self.drop(*self._queued, *self._held)
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def _measure(self, job: Job) -> None:
        try:
            job.nbytes = None if job.dropped else job.size()
            job.measured = True
        except BaseException as error:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
            self._remove(job)
        del job  # the traceback holds this frame, and the job holds the exception
        self._begin_next()

    def _begin_next(self) -> None:
        """Let jobs begin that can."""
        with self._lock:
            while self._queued and self._queued[0].measured and self._fits(self._queued[0].nbytes):
                job = self._queued[0]
                self._begin(job)
                assert self._executor is not None
                self._executor.submit(self._run, job)

    def _fits(self, nbytes: int | None) -> bool:
        if sum(not job.loaded for job in self._held) >= self._threads:
            return False
        while self._freed:
            self._handed_over -= self._freed.popleft()
        largest = max((job.nbytes or 0 for job in self._held if job.loaded), default=0) or self._last
        held = sum(largest if job.nbytes is None else job.nbytes for job in self._held)
        wanted = largest if nbytes is None else nbytes
        return not held or held + self._handed_over + wanted <= self._most_bytes

    def _begin(self, job: Job) -> None:
        self._queued.remove(job)
        self._held.append(job)

    def _run(self, job: Job) -> None:
        if job.future.set_running_or_notify_cancel():
            began = time.perf_counter()
            try:
                media = job.load()
            except BaseException as error:
                with self._lock:  # as below
                    self._remove(job)
                    if not job.on_thread and not isinstance(error, Exception):  # Ctrl-C: it can be loaded again
                        job.future = Future()
                        self._queued.insert(0, job)
                        raise
                    job.future.set_exception(error)
            else:
                job.seconds = time.perf_counter() - began
                with self._lock:  # whoever learns of the end finds it removed
                    job.nbytes, job.loaded = sum(medium.nbytes for medium in media), True
                    self._last = job.nbytes or self._last
                    if job.dropped:
                        self._remove(job)
                    job.future.set_result(media)
                del media
            job.load, job.size = list, int  # they held what was given beside what was made of it
        else:
            self._remove(job)
        del job  # as in _measure
        self._begin_next()

    def _remove(self, job: Job) -> None:
        with self._lock:
            for jobs in (self._queued, self._held):
                if job in jobs:
                    jobs.remove(job)
