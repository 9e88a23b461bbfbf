"""A pipeline on a thread of its own, for servers: threads and asyncio tasks submit, read tokens, and hang up."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any

from qwen2vl_trt.errors import ExecutionError, LimitError, Qwen2VLError, UnavailableError

from .pipeline import Pipeline
from .request import Event, Output, Request
from .sampling_params import SamplingParams
from .scheduling.executor import Counters, NewToken, named

_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Answer:
    """The answer to a request of a :class:`Service`: its tokens by ``for`` or ``async for``, the whole by ``await``.

    All three begin with the first token. Leaving them before the end, by ``break``, an exception or a cancelled task,
    cancels the request. An answer that is not read goes on to its end. ``output`` is the answer so far.

    Attributes:
        output: as far as it has come.
        token_times: when each token came, in seconds of ``time.perf_counter()``.
    """

    def __init__(self, output: Output, hang_up: Callable[[Answer], None]) -> None:
        self.output = output
        self.token_times: list[float] = []
        self._hang_up = hang_up
        self._events: list[Event] = []
        self._over = False
        self._changed = threading.Condition()
        self._waiters: list[_Waiter] = []  # for the next token
        self._end_waiters: list[_Waiter] = []

    def __iter__(self) -> Iterator[Event]:
        """Its tokens, each as it comes; raises what the request failed with, after those there are."""
        seen, over = 0, False
        try:
            while not over:
                new, over = self._wait(seen)
                seen += len(new)
                yield from new
        finally:
            self.cancel()
        self._raise()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The same in an asyncio task; other tasks go on meanwhile."""
        seen, over = 0, False
        try:
            while not over:
                new, over = await self._later(seen)
                seen += len(new)
                for event in new:
                    yield event
        finally:
            self.cancel()
        self._raise()

    def __await__(self) -> Generator[Any, None, Output]:
        """The output, once nothing more will come; like that of ``generate`` it has the error of one that failed."""
        return self._whole().__await__()

    def result(self, timeout: float | None = None) -> Output:
        """The output, once it is finished; for threads. TimeoutError after so many seconds; the request goes on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._over, timeout):
                raise TimeoutError(f"the answer has not ended after {timeout:g} s")
        return self.output

    def cancel(self) -> None:
        """End it within a step, with ``finish_reason`` ``"cancelled"``; its tokens stay. Nothing if it has ended."""
        if not self._over:
            self._hang_up(self)

    def _wait(self, seen: int) -> tuple[list[Event], bool]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > seen or self._over)
            return self._events[seen:], self._over

    async def _later(self, seen: int) -> tuple[list[Event], bool]:
        while True:
            with self._changed:
                if len(self._events) > seen or self._over:
                    return self._events[seen:], self._over
                waiter = _waiter(self._waiters)
            await waiter

    async def _whole(self) -> Output:
        try:
            with self._changed:
                waiter = None if self._over else _waiter(self._end_waiters)
            if waiter is not None:
                await waiter
        finally:
            self.cancel()
        return self.output

    def _raise(self) -> None:
        if self.output.error is not None:
            raise self.output.error

    def _tell(self, event: Event | None, now: float) -> list[_Waiter]:
        """Add a token, or None for the end; on the service's thread. Returns who is to be woken."""
        with self._changed:
            waiters, self._waiters = self._waiters, []
            if event is None:
                self._over = True
                waiters += self._end_waiters
            else:
                self._events.append(event)
                self.token_times.append(now)
            self._changed.notify_all()
        return waiters


def _waiter(waiters: list[_Waiter]) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    waiters.append((loop, loop.create_future()))
    return waiters[-1][1]


def _wake(waiters: list[_Waiter]) -> None:
    """Wake tasks of any loops, each loop once: that writes to its socket."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, waiter in waiters:
        loops.setdefault(loop, []).append(waiter)
    for loop, futures in loops.items():
        with suppress(RuntimeError):  # it is closed: nobody waits
            loop.call_soon_threadsafe(_set, futures)


def _set(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # its task was cancelled
            future.set_result(None)


def _end(answers: Iterable[Answer]) -> None:
    now = time.perf_counter()
    _wake([waiter for answer in answers for waiter in answer._tell(None, now)])


class Service:
    """A pipeline that works on a thread of its own. All methods may be called from any thread, and wait for no step.

    Use it in a ``with``, or call :meth:`close`.

    Args:
        pipeline: the service's alone from now on.
        max_pending: most requests that have not ended, running or waiting; those above are refused.
        warm_up: call :meth:`~qwen2vl_trt.runtime.pipeline.Pipeline.warm_up` first. By default on a GPU, where CUDA
            graphs are captured; on a CPU there is nothing that the first request would have to wait for.

    Raises:
        LimitError: ``max_pending`` below 1.
    """

    def __init__(self, pipeline: Pipeline, max_pending: int = 1024, warm_up: bool | None = None) -> None:
        if not isinstance(max_pending, int) or max_pending < 1:
            raise LimitError(f"max_pending is {max_pending!r}; it must be a whole number of at least 1")
        pipeline.load()  # here, where the caller sees what is wrong with it
        if pipeline.engines.device.type == "cuda" if warm_up is None else warm_up:
            pipeline.warm_up()
        self._pipeline, self._max_pending = pipeline, max_pending
        self._changed = threading.Condition()
        self._live: dict[Output, Answer] = {}
        self._arrived: list[tuple[Request, SamplingParams | None, Output]] = []
        self._left: list[Answer] = []
        self._closed: str | None = None
        # A daemon: a program that forgets to close it ends all the same.
        self._thread = threading.Thread(target=self._run, name="qwen2vl-service", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def submit(self, request: Request, params: SamplingParams | None = None) -> Answer:
        """Queue a request; what is wrong with it is in its answer.

        Raises:
            UnavailableError: the service is full, closed, or has failed.
            ExecutionError: this process was forked from the service's.
        """
        self._pipeline.check_process()
        with self._changed:
            if self._closed is not None:
                raise UnavailableError(self._closed)
            if len(self._live) >= self._max_pending:
                raise UnavailableError(
                    f"{len(self._live):,} requests have not ended, as many as are taken (max_pending); try again later"
                )
            output = self._pipeline.new_output(request)
            answer = self._live[output] = Answer(output, self._hang_up)
            self._arrived.append((request, params, output))
            self._changed.notify()
        self._pipeline.interrupt()
        return answer

    @property
    def closed(self) -> str | None:
        """Why it takes no more requests; None while it does."""
        return self._closed

    def counters(self) -> Counters:
        """The pipeline's :class:`Counters`, with those that are about to be queued."""
        found = self._pipeline.counters()
        arrived = len(self._arrived)
        found.queued += arrived
        found.submitted += arrived
        return found

    def close(self, drain: float | None = 0.0) -> None:
        """Take no more requests, and end the thread and those of the pipeline. It waits; asyncio calls it in a thread.

        Args:
            drain: seconds in which those there are may end; then they are cancelled. None lets all end.

        Raises:
            ExecutionError: this process was forked from the service's.
        """
        self._pipeline.check_process()
        with self._changed:
            self._closed = self._closed or "the service is closed and takes no more requests"
            self._changed.notify()
        self._pipeline.interrupt()
        self._thread.join(drain)
        with self._changed:
            self._left += self._live.values()
        self._pipeline.interrupt()
        self._thread.join()
        self._pipeline.close()
        atexit.unregister(self._close_at_exit)

    def _close_at_exit(self) -> None:
        with suppress(ExecutionError):  # a forked process ends, which is not the service's
            self.close()

    def _hang_up(self, answer: Answer) -> None:
        with self._changed:
            self._left.append(answer)
            self._changed.notify()
        self._pipeline.interrupt()

    def _run(self) -> None:
        try:
            while self._take():
                self._tell(self._pipeline.step())
                self._let_go()
        except Exception as error:
            self._fail(named(error, "the pipeline"))

    def _take(self) -> bool:
        """Hand over who came and who left, once there is something to do; False if there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._left or self._closed or self._pipeline.busy)
            arrived, self._arrived = self._arrived, []
            left, self._left = self._left, []
        for request, params, output in arrived:
            try:
                self._pipeline.submit(request, params, output)
            except Exception as error:  # no SamplingParams, say: this request's fault alone
                output.fail(named(error, "queueing the request"))
        for answer in left:
            self._pipeline.cancel(answer.output)
        if arrived or left:
            self._let_go()  # of those that have ended here: the step may wait for others' media
        return not self._closed or bool(self._arrived) or self._pipeline.busy

    def _tell(self, new: list[NewToken]) -> None:
        now, waiters = time.perf_counter(), []
        for token in new:
            answer = self._live.get(token.sequence.output)
            if answer is not None:  # else somebody else's request
                waiters += answer._tell(Event(0, token.token, token.text, answer.output, token.logprobs), now)
        _wake(waiters)

    def _let_go(self) -> None:
        """Tell those that wait for an answer that has ended."""
        with self._changed:
            over = [answer for output, answer in self._live.items() if output.finished]
            for answer in over:
                del self._live[answer.output]
        _end(over)

    def _fail(self, error: Qwen2VLError) -> None:
        """The pipeline itself broke: its requests end, and no more are taken."""
        with self._changed:
            self._closed = f"the service has failed: {error}"
            live, self._live = self._live, {}
        for output in live:
            output.fail(error)
        _end(live.values())
