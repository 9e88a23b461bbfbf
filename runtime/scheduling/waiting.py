"""Requests that wait for a slot: prepared shortly before their turn, told early where they are wrong or too late."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from ..media.fit_warnings import FitWarnings
from ..request import Output, Request
from ..sampling_params import Sampling
from .media_ahead import Loading, MediaAhead
from .preparation import Prepared, Preparer
from .scheduler import named


@dataclass(eq=False)
class WaitingRequest:
    """``loading`` is set once its turn is near, ``prepared`` once its media are loaded."""

    request: Request
    params: Sampling
    output: Output
    loading: Loading | None = None
    prepared: Prepared | None = None


class WaitingLine:
    """Waiting requests in the order of arrival; those in front may be prepared.

    Args:
        preparer: of the pipeline.
        media_ahead: loads their media.
        clock: seconds, for deadlines.
    """

    def __init__(self, preparer: Preparer, media_ahead: MediaAhead, clock: Callable[[], float]) -> None:
        self._preparer, self._media_ahead, self._clock = preparer, media_ahead, clock
        self._line: deque[WaitingRequest] = deque()
        self._next_deadline = math.inf  # nobody's passes before
        self._interrupted: Future[None] = Future()
        self._fit_warnings = FitWarnings()

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[WaitingRequest]:
        return iter(self._line)

    def add(self, request: Request, params: Sampling, output: Output) -> None:
        """Queue a request behind the others."""
        self._line.append(WaitingRequest(request, params, output))
        self._next_deadline = min(self._next_deadline, output.expires)

    def remove(self, waiting: WaitingRequest) -> None:
        """Its turn has come."""
        self._line.remove(waiting)

    def cancel_all(self) -> None:
        """End every request."""
        for waiting in self._line:
            waiting.output.cancel()
        self.drop_ended()

    def drop_ended(self) -> None:
        """Forget requests that have ended, and load nothing more for them."""
        for waiting in self._line:
            if waiting.output.finished and waiting.loading is not None:
                self._media_ahead.drop(waiting.loading)
        self._line = deque(waiting for waiting in self._line if not waiting.output.finished)

    def expire(self) -> None:
        """End requests whose deadline has passed."""
        if self._clock() < self._next_deadline:
            return
        for waiting in self._line:
            if waiting.output.expired:
                waiting.output.expire("before its turn came")
        self.drop_ended()
        self._next_deadline = min((waiting.output.expires for waiting in self._line), default=math.inf)

    def prepare(self, free_slots: int, slots: int) -> None:
        """Prepare as many requests as there are free slots, and one more a call up to one for each slot.

        So a request that is wrong, or never fits, is told before its turn, and what is loaded ahead stays bounded, in
        bytes too. Threads load the media of all these; a request whose are not there yet, or have no room yet, has its
        turn in a later call.
        """
        ahead = 1
        number = 0
        self._media_ahead.begin_pass([each.prepared.nbytes for each in self._line if each.prepared is not None])
        while number < min(len(self._line), free_slots + slots):
            waiting = self._line[number]
            if waiting.prepared is None:
                try:
                    if waiting.loading is None:
                        sources = self._preparer.sources(waiting.request, waiting.params)
                        waiting.loading = self._media_ahead.start(sources)
                    late = not waiting.loading.ahead and number >= free_slots
                    began = self._clock()  # a thread's seconds, which begin at its start, count for themselves
                    media = self._media_ahead.take(waiting.loading) if ahead or not late else None
                    if media is None:
                        number += 1
                        continue
                    ahead -= late
                    prepared = self._preparer.prepare(waiting.request, media)
                    waiting.params = self._preparer.fit_answer(len(prepared.token_ids), waiting.params)
                    waiting.prepared = prepared
                    self._media_ahead.hold(prepared.nbytes)
                except Exception as error:
                    waiting.output.fail(named(error, "preparing the request"))
                    del self._line[number]
                    continue
                waiting.output.timings.preprocess = waiting.loading.seconds + self._clock() - began
                waiting.loading = None  # it holds what was given beside what was made of it
                waiting.output.prompt_tokens = len(prepared.token_ids)
                waiting.output.images = [each.size for each in prepared.media if not each.is_video]
                waiting.output.videos = [each.size for each in prepared.media if each.is_video]
                self._fit_warnings.tell(each.note for each in prepared.media if each.note is not None)
            number += 1

    def next_group(self, free_slots: int, most_media: int) -> list[tuple[WaitingRequest, Prepared]]:
        """The first that are prepared, as many as there are free slots; their media fill about one engine call.

        Those in front whose media are still loaded are passed over, until they are: nothing that comes later is then
        before them. The rest have their turn in the next step: the answers under way need not wait for all of them.
        """
        group: list[tuple[WaitingRequest, Prepared]] = []
        media = 0
        prepared_ones = ((waiting, waiting.prepared) for waiting in self._line if waiting.prepared is not None)
        for waiting, prepared in islice(prepared_ones, free_slots):
            media += len(prepared.media)
            if group and media > most_media:
                break
            group.append((waiting, prepared))
        return group

    def wait_for_media(self) -> bool:
        """Wait for a request's media, the next deadline or an interrupt; False if no request waits for media.

        Where no thread is at any of them, there was no room for them when they were looked at. There may be by now, as
        what held it may have failed since: nothing is waited for.
        """
        loadings = [each.loading for each in self._line if each.loading is not None and each.prepared is None]
        if not loadings:
            return False
        if all(loading.future is None for loading in loadings):
            return True
        seconds = max(0.0, self._next_deadline - self._clock())
        patience = None if math.isinf(seconds) else min(seconds, threading.TIMEOUT_MAX)
        Loading.wait_for_any(loadings, patience, self._interrupted)
        if self._interrupted.done():
            self._interrupted = Future()
        return True

    def interrupt(self) -> None:
        """End a wait for media, that of another thread too, or the next one; any thread may."""
        with suppress(InvalidStateError):  # another did
            self._interrupted.set_result(None)
