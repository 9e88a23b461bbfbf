"""In-flight batching: requests join and leave a running batch.

A step reads chunks of prompts, at most ``max_num_tokens`` tokens together, and adds a token to every running answer.
Where the decoder takes packed chunks that is one call; otherwise prompts of like length are read in one call, and the
answers go on in another.

The oldest prompt gets at least half of the tokens, the rest goes to those with the least left to read. With
h = ceil(max_num_tokens / 2), a prompt of P tokens is read after at most the sum of ceil(P / h) + 1 steps over itself
and the prompts before it. A prompt that begins like one being read waits for that one and shares what it has read;
where it is the oldest, its share goes there. A prompt whose images are still being embedded is skipped while there is
other work.

One step ahead, on a GPU: a step is launched before the host looks at the tokens of the one before it, which reach it on
the device. What a request does after its end is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.transfer import to_device

from ..backends.runners import DecoderRunner
from ..backends.steps import Chunk, Step
from ..observer import Observer, Stage, unobserved
from ..request import Output
from ..sampler import SampledTokens, Sampler
from ..triton_sampler import checked_kernel
from .executor import Counters, Executor, NewToken, named, take_token
from .kv_cache import SlotManager, Wait, kv_cache_manager
from .sequence import RunningSequence
from .side_stream import ReadyEvent, SideStream

_MOST_CALLS = 4
"""Calls for prompts in one step of a decoder that does not pack: each reads all weights, while the answers wait."""

_CALL_TOKENS = {"cpu": 8, "cuda": 128}
"""Prompt tokens whose products take as long as reading the weights, about: so much padding costs what a call costs."""

_NORMAL = nullcontext()

_NOT_FINITE = (
    "the decoder made logits that are no finite numbers: the checkpoint's weights are damaged, or numbers overflowed"
    " (--precision fp16-decoder: build in bf16)"
)


@dataclass(eq=False, slots=True)
class _Row:
    """A request's part of a step: ``length`` tokens of its prompt, or of its ``answers`` the last one."""

    sequence: RunningSequence
    length: int
    answers: bool


@dataclass
class _Launched:
    """A step that the device works on: the requests that get a token, and the tokens."""

    sequences: list[RunningSequence] = field(default_factory=list)
    tokens: SampledTokens | None = None


class Scheduler(Executor):
    """Shares a decoder's slots, which are its alone while it is busy, among sequences.

    Args:
        decoder: the engine.
        max_num_tokens: most prompt tokens in one step.
        reuse_prefixes: prompts share keys and values with running requests, and with ended ones that are still cached.
        counters: where to count.
        observe: surrounds every ``prefill``, ``decode`` and ``sampling``.
        ahead: launch a step before the tokens of the last one are looked at.
    """

    def __init__(
        self,
        decoder: DecoderRunner,
        max_num_tokens: int,
        reuse_prefixes: bool = True,
        counters: Counters | None = None,
        observe: Observer = unobserved,
        ahead: bool = False,
    ) -> None:
        self._decoder = decoder
        self._max_num_tokens = max_num_tokens
        self._cache = kv_cache_manager(decoder.cache, decoder.slots, reuse_prefixes)
        self.slots = decoder.slots
        self._prompts: list[RunningSequence] = []  # still to be read, oldest first; those begun have a slot
        self._waits: dict[RunningSequence, Wait] = {}
        self._counters, self._observe = counters or Counters(), observe
        self._ahead, self._launched = ahead and decoder.enqueues, _Launched()
        self._new: list[NewToken] = []
        self._device = decoder.embed([0]).device
        # Before the vision engine's kernels.
        self._stream = SideStream.beside(self._device, priority=-1) if ahead else SideStream(self._device, None)
        kernel = checked_kernel(decoder.vocab_size, self._device) if self._device.type == "cuda" else None
        self._sampler = Sampler(self.slots, decoder.vocab_size, self._device, kernel)
        self._free_indices = list(range(self.slots))
        self._no_memory = False  # for a prompt that waits
        self._last_tokens: tuple[list[int], Tensor] = [], torch.empty(0)  # of the last step, by index
        self._mark = object()

    @property
    def running(self) -> int:
        """Requests that have a slot or are sure of one."""
        return self.slots - len(self._free_indices) + sum(prompt.slot is None for prompt in self._prompts)

    @property
    def busy(self) -> bool:
        return len(self._free_indices) < self.slots or bool(self._prompts)

    @property
    def cache_bytes(self) -> int:
        return self._decoder.cache.nbytes

    @property
    def cache_usage(self) -> float:
        return self._cache.usage

    @property
    def kept_tokens(self) -> int:
        return self._cache.kept_tokens

    @property
    def free_slots(self) -> int:
        """None while a prompt waits for memory: the embeddings of others would take more of it."""
        return 0 if self._no_memory else self.slots - self.running

    def inputs_embeds(self, sequence: RunningSequence, embeds: Sequence[Tensor]) -> Tensor:
        """``[S, C]`` of a prompt with its media's embeddings ``[tokens, C]`` in place."""
        rows = self._decoder.embed(sequence.token_ids)
        if embeds:
            # Found on the host: a mask on a GPU would have to be counted, which waits for all before it.
            rows.index_copy_(0, to_device(sequence.places, rows.device), torch.cat(list(embeds)).to(rows.dtype))
        return rows

    def add(self, sequence: RunningSequence) -> None:
        if self.running == self.slots:
            raise ValueError(f"all {self.slots} slots are taken")
        cache = self._decoder.cache
        if cache.owner is not self._mark:
            self._cache.forget()
            cache.owner = self._mark
        self._cache.add(sequence)
        sequence.media = []  # their pixels: all that the decoder reads is embedded
        self._prompts.append(sequence)

    def cancel(self, output: Output) -> None:
        with self._work():
            for sequence in [*self._cache.occupied, *self._prompts]:
                if sequence.output is output:
                    output.cancel()
                    self._remove(sequence)
            self._settle()

    def forget(self) -> None:
        with self._work():
            self._cache.forget()
            self._settle()

    def warm_up(self, chunk: int, longest: int) -> None:
        """See :class:`Executor`; forgets what ended requests left, and raises ValueError while one runs."""
        if self.busy:
            raise ValueError("the slots are in use")
        self._cache.forget()
        self._decoder.cache.owner = self._mark  # no other scheduler finds in it what it left
        with self._work():
            self._decoder.warm_up(chunk, longest)
            self._decoder.reset()

    def hidden_states(self, sequences: Sequence[RunningSequence]) -> list[Tensor]:
        """``[S, C]`` after the final norm of each prompt, S of them all together, while nothing runs.

        Raises:
            ValueError: a request runs, or there are more than slots.
        """
        if self.busy:
            raise ValueError("the slots are in use")
        with self._work(sequences) as ready:
            states = self._read_all(sequences)
        ready.wait(*states)
        return states

    def _read_all(self, sequences: Sequence[RunningSequence]) -> list[Tensor]:
        self.forget()
        states: dict[RunningSequence, list[Tensor]] = {sequence: [] for sequence in sequences}
        waiting = list(sequences)
        for sequence in sequences:
            sequence.counts = False
        try:
            while waiting:
                rows: list[_Row] = []
                left = self._max_num_tokens
                for sequence in waiting:
                    if rows and sequence.unread > left:
                        continue  # whole prompts, where they are not longer than a step
                    if sequence.slot is None and not self._allocate(sequence):
                        break
                    rows.append(_Row(sequence, min(sequence.unread, left), False))
                    left -= rows[-1].length
                for call in self._calls(rows):
                    parts = self._run(call, hidden=True).hidden_states
                    assert parts is not None
                    for row, part in zip(call, parts.split([row.length for row in call])):
                        states[row.sequence].append(part.clone())
                for sequence in waiting:
                    if not sequence.reading:
                        self._release(sequence)
                waiting = [sequence for sequence in waiting if sequence.reading]
        finally:
            for sequence in sequences:
                self._release(sequence)
            self.forget()
        return [torch.cat(parts) for parts in states.values()]

    def step(self) -> list[NewToken]:
        """Some chunks of prompts, if any wait, and one token of every running answer."""
        with self._work():
            self._step()
        new, self._new = self._new, []
        return new

    def _step(self) -> None:
        for prompt in [*self._prompts]:
            if not prompt.output.finished:
                if not prompt.output.expired:
                    continue
                rest = prompt.stream.end("deadline") if prompt.sampled else ""  # of an answer that is computed again
                stage = "while the prompt was read" if prompt.cached else "before the prompt was read"
                prompt.output.expire(stage, rest)
            self._remove(prompt)  # ended, or cancelled by whoever holds it
        rows = self._answers()
        if self._prompts:
            rows += self._chunks()
        launched = self._launch(rows)
        if self._ahead:
            launched, self._launched = self._launched, launched
        self._take(launched)
        self._settle()

    @contextmanager
    def _work(self, reads: object = None) -> Iterator[ReadyEvent]:
        """Work on the decoder's stream; while nothing runs the caller's stream is behind it.

        Not in the caller's inference mode: the next caller may have none, and what is made here is written again. For
        the argument and what it yields see :meth:`~.side_stream.SideStream.work`.
        """
        # To enter it costs a tenth of a step of one answer.
        normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NORMAL
        with normal, self._stream.work(reads) as ready:
            yield ready
        if not self.busy:
            ready.wait()

    def _settle(self) -> None:
        """While nothing runs the cache shrinks to what ended requests left."""
        if self.busy:
            return
        self._launched = _Launched()
        self._cache.settle()
        if not self._cache.kept_tokens:
            self._decoder.reset()

    def _release(self, sequence: RunningSequence, sound: bool = True) -> None:
        if sequence.slot is not None:
            self._cache.release(sequence, sound)
            self._free_indices.append(sequence.index)
            self._no_memory = False

    def _remove(self, sequence: RunningSequence, sound: bool = True) -> None:
        self._release(sequence, sound)
        if sequence in self._prompts:
            self._prompts.remove(sequence)
        self._waits.pop(sequence, None)
        sequence.inputs_embeds = sequence.inputs_embeds.new_empty(0)

    def _fail(self, sequence: RunningSequence, error: Exception) -> None:
        sequence.output.fail(named(error, "the decoder engine"))
        self._remove(sequence, sound=False)

    # What takes part in a step

    def _answers(self) -> list[_Row]:
        """A row for each answer that wants another token, by slot."""
        rows = [
            _Row(sequence, 1, True)
            for sequence in self._cache.occupied
            if not sequence.reading and sequence.sampled < sequence.params.max_tokens
        ]
        if not self._cache.preempts:
            return rows
        for row in rows:
            while row.sequence.slot is not None and not self._cache.grow(row.sequence):
                if self._launched.sequences:  # some may end, and whoever is preempted must know all its tokens
                    self._take(self._launched)
                    self._launched = _Launched()
                else:
                    self._preempt()
        return [row for row in rows if row.sequence.slot is not None]

    def _preempt(self) -> None:
        """Take its memory from the request that came last; it is read again, answer included, when there is memory.

        vLLM calls this preemption by recomputation.
        """
        last = max(self._cache.occupied, key=lambda sequence: sequence.output.arrival)
        self._counters.preemptions += 1
        self._release(last)
        answer = last.stream.token_ids[len(last.token_ids) - last.prompt_length :]
        if answer:
            last.restart(self._decoder.embed(answer))
        last.cached, last.counts = 0, False
        self._cache.add(last)
        if last not in self._prompts:
            later = (n for n, each in enumerate(self._prompts) if each.output.arrival > last.output.arrival)
            self._prompts.insert(next(later, len(self._prompts)), last)

    def _chunks(self) -> Iterator[_Row]:
        """What is read of prompts."""
        left, read, full = self._max_num_tokens, set[RunningSequence](), False
        while left and (self._decoder.packed or len(read) < _MOST_CALLS):
            # Where there is no memory for one that waits, those that have theirs go on and no later one begins.
            prompts = [prompt for prompt in self._embedded() if prompt.slot is not None or not full]
            sequence = self._shortest(prompts, read) if read else self._oldest(prompts)
            if sequence is None:
                return
            most = left
            if not read:
                others = sum(p.unread for p in prompts if p not in self._waits) - sequence.unread
                most = max(-(-left // 2), left - others)
            if sequence.slot is None:
                try:
                    full = not self._allocate(sequence)
                    if full:
                        continue
                except Exception as error:
                    self._fail(sequence, error)
                    continue
            read.add(sequence)
            length = min(sequence.unread, most)
            left -= length
            yield _Row(sequence, length, False)

    def _oldest(self, prompts: Sequence[RunningSequence]) -> RunningSequence | None:
        """The prompt that came first, or the one that it waits for."""
        if not prompts:
            return None
        oldest = prompts[0]
        return oldest if self._ready(oldest) else self._waits[oldest].leader

    def _shortest(self, prompts: Sequence[RunningSequence], read: set[RunningSequence]) -> RunningSequence | None:
        """The prompt with the least to read among those that this step has not read from and that wait for none."""
        candidates = sorted((prompt for prompt in prompts if prompt not in read), key=lambda prompt: prompt.unread)
        return next((prompt for prompt in candidates if self._ready(prompt)), None)

    def _embedded(self) -> list[RunningSequence]:
        """Prompts whose embeddings are there. Where nothing else is to be done, all: the stream waits for them."""
        there = [prompt for prompt in self._prompts if prompt.slot is not None or prompt.ready.passed]
        if there or any(not sequence.reading for sequence in self._cache.occupied):
            return there
        return self._prompts

    def _ready(self, sequence: RunningSequence) -> bool:
        """Whether a prompt has a slot or can have one; else it is better to wait for another prompt."""
        wait = self._waits.get(sequence)
        if wait is not None and not wait.over:
            return False
        self._waits.pop(sequence, None)
        wait = self._cache.wait(sequence) if sequence.slot is None else None
        if wait is not None:
            self._waits[sequence] = wait
        return wait is None

    def _allocate(self, sequence: RunningSequence) -> bool:
        """Give a prompt its slot, with what it shares with others in it; False if there is no memory now."""
        self._no_memory = not self._cache.allocate(sequence)
        if self._no_memory:
            return False
        sequence.index = self._free_indices.pop()
        sequence.ready.wait(sequence.inputs_embeds)
        answer = sequence.stream.token_ids
        self._sampler.start(sequence.index, sequence.params, sequence.token_ids[: sequence.prompt_length], answer)
        if sequence.counts:
            sequence.output.start()
            sequence.output.reused_tokens = sequence.cached
            self._counters.started += 1
            self._counters.queue_seconds += sequence.output.timings.queue
            self._counters.prompt_tokens_reused += sequence.cached
        return True

    # The calls

    def _launch(self, rows: Sequence[_Row]) -> _Launched:
        """Enqueue a step and the sampling of its tokens. Rows that fail together get a try alone."""
        launched = _Launched()
        results: list[Step] = []
        for call in self._calls(rows):
            if results:  # the next call may overwrite them
                results[-1] = results[-1]._replace(logits=results[-1].logits.clone(), greedy=None)
            for done, step in self._attempt(call):
                wanted = [row.sequence for row in done if row.answers or not row.sequence.reading]
                if wanted:
                    launched.sequences += wanted
                    results.append(step)
        if not results:
            return launched
        logits, greedy = results[0].logits, results[0].greedy
        if len(results) > 1:
            logits, greedy = torch.cat([step.logits for step in results]), None
        indices = [sequence.index for sequence in launched.sequences]
        allowed = self._allowed(launched.sequences)
        try:
            with self._observe(Stage("sampling")):
                launched.tokens = self._sampler(logits, indices, greedy, allowed)
        except Exception as error:
            for sequence in launched.sequences:
                self._fail(sequence, error)
            return _Launched()
        self._last_tokens = indices, launched.tokens.tokens
        for sequence in launched.sequences:
            sequence.sampled += 1
        return launched

    def _allowed(self, sequences: Sequence[RunningSequence]) -> np.ndarray | None:
        """What grammars allow as next tokens, see :class:`Sampler`; the engine works on the step meanwhile.

        One step ahead the tokens of the step before are taken here, which is before this one's are sampled.
        """
        if not any(map(attrgetter("matcher"), sequences)):
            return None
        self._take(self._launched)
        self._launched = _Launched()
        allowed = np.full((len(sequences), -(-self._decoder.vocab_size // 32)), -1, np.int32)
        for row, sequence in zip(allowed, sequences):
            if sequence.matcher is None or sequence.output.finished:
                continue
            try:
                sequence.matcher.fill(row)
            except Exception as error:
                row.fill(-1)
                self._fail(sequence, error)
        return allowed

    def _calls(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        """The rows of each call of the decoder."""
        if self._decoder.packed:
            return [list(rows)] if rows else []
        answers = [row for row in rows if row.answers]
        calls = self._padded_calls([row for row in rows if not row.answers])
        return [*calls, answers] if answers else calls

    def _padded_calls(self, rows: Sequence[_Row]) -> list[list[_Row]]:
        """Prompts of like length together, where padding one costs less than a call of its own."""
        calls: list[list[_Row]] = []
        for row in sorted(rows, key=lambda row: -row.length):
            longest = calls[-1][0].length if calls else 0
            fits = row.sequence.cached + longest <= self._decoder.cache.max_seq_len
            if calls and fits and longest - row.length <= _CALL_TOKENS[self._device.type]:
                calls[-1].append(row)
            else:
                calls.append([row])
        return calls

    def _attempt(self, rows: list[_Row]) -> list[tuple[list[_Row], Step]]:
        try:
            return [(rows, self._run(rows))]
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0].sequence, error)
                return []
        self._counters.decode_retries += 1
        self._last_tokens = self._last_tokens[0], self._last_tokens[1].clone()  # a call may overwrite them
        return [
            (own, step._replace(logits=step.logits.clone(), greedy=None))  # before the next row's call
            for row in rows
            for own, step in self._attempt([row])
        ]

    def _run(self, rows: list[_Row], hidden: bool = False) -> Step:
        """One call of the decoder; logits of the rows that get a token. Sorts the rows by slot where that matters."""
        if isinstance(self._cache, SlotManager) and not self._decoder.packed:
            if not rows[0].answers:  # not before: the calls of a step may move each other's requests
                self._cache.make_neighbours([row.sequence for row in rows])
            rows.sort(key=attrgetter("sequence.slot"))
        chunks = [
            Chunk(row.sequence.slot, row.sequence.cached, row.length, row.sequence.adapter)  # type: ignore[arg-type]
            for row in rows  # each has a slot
        ]
        wanted = [number for number, row in enumerate(rows) if row.answers or row.length >= row.sequence.unread]
        embeds, positions = self._inputs(rows, chunks)
        outputs = [row.sequence.output for row in rows]
        stage = Stage("decode" if rows[-1].answers else "prefill", outputs, chunks)  # answers are in front
        if not self._decoder.packed:
            chunks, embeds, positions, wanted = self._filled(chunks, embeds, positions, wanted)
        ending = [row.sequence.features is not None and row.length >= row.sequence.unread for row in rows]
        hidden = hidden or any(ending)
        with self._observe(stage):
            step = self._decoder.step(chunks, embeds, positions, None if len(wanted) == len(chunks) else wanted, hidden)
        if any(ending):
            assert step.hidden_states is not None
            for row, states, ends in zip(rows, step.hidden_states.split([row.length for row in rows]), ending):
                if ends:
                    row.sequence.found = [states[-1].clone()]  # before the next step
        for row in rows:
            row.sequence.cached += row.length
            if not row.answers:  # an answer's blocks are named when it ends
                self._read(row)
        return step

    def _last(self, indices: list[int]) -> Tensor:
        """The last tokens of answers, on the device; every answer got one in the last step."""
        known, tokens = self._last_tokens
        if indices == known:
            return tokens
        places = {index: place for place, index in enumerate(known)}
        return tokens[to_device([places[index] for index in indices], self._device)]

    def _inputs(self, rows: Sequence[_Row], chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """``inputs_embeds [T, C]`` and ``position_ids [3, T]`` of a call; answers are in front, or alone."""
        answers = sum(row.answers for row in rows)
        embeds, positions = [], []
        if answers:
            embeds.append(self._decoder.embed(self._last([row.sequence.index for row in rows[:answers]])))
            numbers = np.empty((3, answers), np.int64)
            numbers[:] = [chunk.start + row.sequence.delta for row, chunk in zip(rows[:answers], chunks)]
            positions.append(torch.from_numpy(numbers))
        for row, chunk in zip(rows[answers:], chunks[answers:]):
            embeds.append(row.sequence.inputs_embeds[chunk.start : chunk.end])
            positions.append(row.sequence.position_ids[:, chunk.start : chunk.end])
        if len(embeds) == 1:
            return embeds[0], positions[0]
        return torch.cat(embeds), torch.cat(positions, dim=1)

    def _filled(
        self, chunks: list[Chunk], embeds: Tensor, positions: Tensor, wanted: list[int]
    ) -> tuple[list[Chunk], Tensor, Tensor, list[int]]:
        """A decode step's rows with the slots between them, which an engine over rows cannot leave out.

        What such a slot writes lies beyond the tokens that it holds or keeps
        (test_kept_prefixes_survive_their_neighbours), and its next request overwrites it.
        """
        first, last = chunks[0].slot, chunks[-1].slot
        places = [chunk.slot - first for chunk in chunks]
        if last - first == len(chunks) - 1:
            return chunks, embeds, positions, wanted
        assert isinstance(self._cache, SlotManager)
        filled = [Chunk(slot, self._cache.held(slot), 1) for slot in range(first, last + 1)]
        for place, chunk in zip(places, chunks):
            filled[place] = chunk
        embeds = embeds.new_zeros(len(filled), embeds.shape[1]).index_copy_(0, to_device(places, embeds.device), embeds)
        positions = positions.new_zeros(3, len(filled)).index_copy_(1, torch.tensor(places), positions)
        return filled, embeds, positions, [places[number] for number in wanted]

    def _read(self, row: _Row) -> None:
        """Note that a chunk of a prompt is in the cache."""
        sequence = row.sequence
        self._cache.written(sequence)
        if sequence.counts:
            self._counters.prompt_tokens_computed += row.length
        if not sequence.reading and sequence in self._prompts:
            self._prompts.remove(sequence)
            if not self._cache.preempts:
                sequence.inputs_embeds = sequence.inputs_embeds.new_empty(0)  # hundreds of megabytes in a full batch

    # Tokens

    def _take(self, launched: _Launched) -> None:
        """Give the requests of a step their tokens; the host waits for them here alone."""
        if launched.tokens is None:
            return
        try:
            tokens = launched.tokens.tolist()
            logprobs = launched.tokens.logprobs([sequence.params.logprobs for sequence in launched.sequences])
        except Exception as error:  # a GPU reports here what went wrong before
            for sequence in launched.sequences:
                if not sequence.output.finished:
                    self._fail(sequence, error)
            return
        now = launched.sequences[0].output.clock()  # one of the pipeline for all
        for sequence, token, each in zip(launched.sequences, tokens, logprobs, strict=True):
            output = sequence.output
            if output.finished:  # before this step was launched, or meanwhile by whoever holds it
                self._remove(sequence)
                continue
            if token is None:
                self._fail(sequence, ExecutionError(_NOT_FINITE))
                continue
            try:
                if sequence.matcher is not None:
                    sequence.matcher.push(token)
                if sequence.features is None:
                    self._new.append(take_token(sequence, token, self._counters, now, each))
                else:
                    sequence.finish()
            except Exception as error:
                self._fail(sequence, error)
                continue
            if output.finished:
                self._remove(sequence)
