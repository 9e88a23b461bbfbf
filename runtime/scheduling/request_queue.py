"""The request queue: requests are prepared shortly before their turn, and end early if they are wrong or too late."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

from qwen2vl_trt.messages import Media

from ..prefetcher import Job, Prefetcher
from ..preprocessing.sizes import Medium
from ..request import Output, Request
from ..sampling_params import Sampling
from ..structured_outputs import Matcher
from .executor import named
from .preparation import Preparer, loading_bytes, on_gpu
from .sequence import RunningSequence

MOST_WARNINGS = 10
"""Of images and videos that were resized to fit the engines, in one pipeline."""

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class QueuedRequest:
    """``found`` and ``job`` are set once its turn is near, ``matcher`` by the job, ``sequence`` after it."""

    request: Request
    params: Sampling
    output: Output
    found: Media | None = None
    job: Job | None = None
    matcher: Matcher | None = None
    sequence: RunningSequence | None = None


class RequestQueue:
    """Requests in the order of arrival; those in front may be prepared. ``overlap`` lets threads load their media."""

    def __init__(self, preparer: Preparer, prefetcher: Prefetcher, overlap: bool, clock: Callable[[], float]) -> None:
        self._preparer, self._prefetcher, self._overlap, self._clock = preparer, prefetcher, overlap, clock
        self._queue: deque[QueuedRequest] = deque()
        self._next_deadline = math.inf
        self._interrupted: Future[None] = Future()
        self._resized = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._queue)

    def add(self, request: Request, params: Sampling, output: Output) -> None:
        """Queue a request behind the others."""
        self._queue.append(QueuedRequest(request, params, output))
        self._next_deadline = min(self._next_deadline, output.expires)

    def cancel_all(self) -> None:
        """End every request."""
        for queued in self._queue:
            queued.output.cancel()
        self.drop_ended()

    def drop_ended(self) -> None:
        """Forget requests that have ended, and load nothing more for them."""
        ended = (queued for queued in self._queue if queued.output.finished)
        self._prefetcher.drop(*(queued.job for queued in ended if queued.job is not None))
        self._queue = deque(queued for queued in self._queue if not queued.output.finished)

    def expire(self) -> None:
        """End requests whose deadline has passed."""
        if self._clock() < self._next_deadline:
            return
        for queued in self._queue:
            if queued.output.expired:
                queued.output.expire("before its turn came")
        self.drop_ended()
        self._next_deadline = min((queued.output.expires for queued in self._queue), default=math.inf)

    def prepare(self, free_slots: int, slots: int) -> None:
        """Prepare as many requests as there are free slots, and more up to one for each slot.

        So what is wrong with a request is known before its turn, and what is loaded ahead is bounded in number; the
        prefetcher bounds its bytes. Of requests beyond the free slots one a call is prepared whose media, if any, this
        thread loads. A request whose media are not there yet has its turn in a later call.
        """
        more, number = 1, -1
        try:
            for queued in [*islice(self._queue, free_slots + slots)]:
                number += 1
                if queued.sequence is not None:
                    continue
                try:
                    self._begin(queued)
                    job = queued.job
                    on_thread = job is not None and job.on_thread
                    beyond = number >= free_slots and not on_thread
                    if beyond and not more:
                        continue
                    began = self._clock()  # a thread's seconds, which begin at its start, count for themselves
                    media = [] if job is None else self._prefetcher.result(job)
                    if media is None:
                        continue
                    more -= beyond
                    sequence = self._preparer.prepare(
                        queued.request, queued.params, queued.output, media, queued.matcher
                    )
                except Exception as error:
                    queued.output.fail(named(error, "preparing the request"))
                    number -= 1
                    continue
                queued.sequence, queued.found = sequence, None
                timings = queued.output.timings
                timings.load = 0.0 if job is None else job.seconds
                on_thread_seconds = timings.load if on_thread else 0.0
                timings.preprocess = self._clock() - began + on_thread_seconds
                self._warn(media)
        finally:
            if any(queued.output.finished for queued in self._queue):
                self.drop_ended()

    def next_group(self, free_slots: int, most_media: int, most_tokens: int) -> list[RunningSequence]:
        """The first that are prepared, as many as there are free slots; their media fill about one engine call.

        Those in front whose media are still being loaded are passed over; nothing that comes later is then before them.
        The rest have their turn in the next step: answers under way need not wait for all of them.
        """
        group: list[RunningSequence] = []
        media = tokens = 0
        prepared = (queued.sequence for queued in self._queue if queued.sequence is not None)
        for sequence in islice(prepared, free_slots):
            media += len(sequence.media)
            tokens += sum(medium.size.tokens for medium in sequence.media)
            if group and (media > most_media or tokens > most_tokens):
                break
            group.append(sequence)
        return group

    def remove(self, sequence: RunningSequence) -> None:
        """Its turn has come: whoever takes it has its media."""
        queued = next(queued for queued in self._queue if queued.sequence is sequence)
        self._queue.remove(queued)
        if queued.job is not None:
            self._prefetcher.hand_over(queued.job, sequence.media)

    def wait_for_media(self) -> bool:
        """Wait for a request's media, the next deadline or an interrupt; False if no request waits for media.

        Where no thread is at any of them, they could not begin when they were looked at. They may by now, as what was
        before them may have failed since: nothing is waited for.
        """
        jobs = [each.job for each in self._queue if each.job is not None and each.sequence is None]
        if not any(job.on_thread for job in jobs):
            return bool(jobs)
        seconds = max(0.0, self._next_deadline - self._clock())
        self._prefetcher.wait(
            jobs, None if math.isinf(seconds) else min(seconds, threading.TIMEOUT_MAX), self._interrupted
        )
        if self._interrupted.done():
            self._interrupted = Future()
        return True

    def interrupt(self) -> None:
        """End a wait for media, that of another thread too, or the next one; any thread may."""
        with suppress(InvalidStateError):  # another did
            self._interrupted.set_result(None)

    def _begin(self, queued: QueuedRequest) -> None:
        """Find a request's media and have them loaded.

        What lies on a GPU is ordered by the streams of this thread, so this thread loads it.
        """
        if queued.found is None:
            queued.found, most_tokens = self._preparer.find_media(queued.request, queued.params)
            found = queued.found
            if found.images or found.videos or queued.params.structured_outputs is not None:
                load = partial(self._load, queued, found, most_tokens)
                on_thread = self._overlap and not on_gpu([*found.images, *found.videos])
                queued.job = self._prefetcher.submit(load, partial(loading_bytes, found), on_thread)

    def _load(self, queued: QueuedRequest, found: Media, most_tokens: int | None) -> list[Medium]:
        """Load a request's media, and compile its grammar."""
        if queued.params.structured_outputs is not None:
            queued.matcher = self._preparer.grammars.matcher(queued.params.structured_outputs)
        return self._preparer.load(found, most_tokens)

    def _warn(self, media: Sequence[Medium]) -> None:
        """Log what was resized to fit the engines: the first of them, then that there are more."""
        for medium in media:
            if medium.note is None or self._resized > MOST_WARNINGS:
                continue
            self._resized += 1
            if self._resized <= MOST_WARNINGS:
                _logger.warning("%s", medium.note)
            else:
                _logger.warning("more are resized to fit the engines; the sizes are in Output.images and Output.videos")
