"""In-flight batching: requests join and leave a running batch.

A step reads a few chunks of prompts, each in its request's own slot, at most ``max_num_tokens`` tokens together, and
then adds one token to every running answer.

The oldest prompt gets at least half of the tokens, the rest goes to those with the least left to read. With
h = ceil(max_num_tokens / 2), a prompt of P tokens is read after at most the sum of ceil(P / h) + 1 steps over itself
and the prompts before it. A prompt that begins like one being read waits for that one and copies what they share; where
it is the oldest, its share goes there. A prompt whose images are still being embedded is skipped while there is other
work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl_trt.errors import ExecutionError
from qwen2vl_trt.transfer import to_device

from ..backends.runners import DecoderRunner, Step
from ..observer import Observer, Stage, unobserved
from ..request import Output
from ..sampler import Sampler
from .executor import Counters, Executor, NewToken, named, take_token
from .sequence import NO_KEYS, RunningSequence
from .slots import Placement, Slots, Wait

_MOST_CHUNKS = 4
"""Chunks in one step: each is a call of its own, which reads all weights, while the answers wait."""

_NOT_FINITE = (
    "the decoder made logits that are no finite numbers: the checkpoint's weights are damaged, or numbers overflowed"
    " (--precision fp16-decoder: build in bf16)"
)


class Scheduler(Executor):
    """Shares a decoder's slots, which are its alone while it is busy, among sequences.

    Args:
        decoder: the engine.
        max_num_tokens: most prompt tokens in one step.
        reuse_prefixes: prompts share keys and values with running requests, and with ended ones whose slot is free.
        counters: where to count.
        observe: surrounds every ``prefill``, ``decode`` and ``sampling``.
    """

    def __init__(
        self,
        decoder: DecoderRunner,
        max_num_tokens: int,
        reuse_prefixes: bool = True,
        counters: Counters | None = None,
        observe: Observer = unobserved,
    ) -> None:
        self._decoder = decoder
        self._max_num_tokens = max_num_tokens
        self._reuse_prefixes = reuse_prefixes
        self._slots = Slots(decoder.slots)
        self.slots = decoder.slots
        self._prompts: list[RunningSequence] = []  # still to be read, oldest first; those begun have a slot
        self._waits: dict[RunningSequence, Wait] = {}
        self._counters, self._observe = counters or Counters(), observe
        self._mark = object()
        self._sampler: Sampler | None = None

    @property
    def running(self) -> int:
        """Requests that have a slot or are sure of one."""
        return len(self._slots.occupied) + sum(prompt.slot is None for prompt in self._prompts)

    @property
    def cache_bytes(self) -> int:
        return self._decoder.cache.nbytes

    @property
    def kept_tokens(self) -> int:
        return sum(self._slots.kept_lengths)

    def inputs_embeds(self, sequence: RunningSequence, embeds: Sequence[Tensor]) -> Tensor:
        """``[S, C]`` of a prompt with its media's embeddings ``[tokens, C]`` in place."""
        rows = self._decoder.embed(sequence.token_ids)
        if embeds:
            # Found on the host: a mask on a GPU would have to be counted, which waits for all before it.
            rows.index_copy_(0, to_device(sequence.places, rows.device), torch.cat(list(embeds)).to(rows.dtype))
        return rows

    def add(self, sequence: RunningSequence) -> None:
        if not self.free_slots:
            raise ValueError(f"all {self.slots} slots are taken")
        cache = self._decoder.cache
        if cache.owner is not self._mark:
            self._slots.forget()
            cache.owner = self._mark
        if not self._reuse_prefixes:
            sequence.keys = NO_KEYS
        sequence.media = []  # their pixels: all that the decoder reads is embedded
        self._prompts.append(sequence)

    def cancel(self, output: Output) -> None:
        for sequence in [*self._slots.occupied, *self._prompts]:
            if sequence.output is output:
                output.cancel()
                self._remove(sequence)
        self._settle()

    def forget(self) -> None:
        self._slots.forget()
        self._settle()

    def warm_up(self, chunk: int, longest: int) -> None:
        """See :class:`Executor`; forgets what ended requests left, and raises ValueError while one runs."""
        if self.busy:
            raise ValueError("the slots are in use")
        self._slots.forget()
        self._decoder.cache.owner = self._mark  # no other scheduler finds in it what it left
        self._decoder.warm_up(chunk, longest)
        self._decoder.reset()

    def step(self) -> list[NewToken]:
        """Some chunks of prompts, if any wait, and one token of every running answer."""
        for prompt in [prompt for prompt in self._prompts if prompt.output.expired]:
            prompt.output.expire("while the prompt was read" if prompt.cached else "before the prompt was read")
            self._remove(prompt)
        new = self._read_prompts()
        new += self._decode([sequence for sequence in self._slots.occupied if sequence.token is not None])
        self._settle()
        return new

    def _settle(self) -> None:
        """While nothing runs the cache shrinks to what ended requests left."""
        if self.busy:
            return
        longest = max(self._slots.kept_lengths)
        if longest:
            self._decoder.cache.trim(longest)
        else:
            self._decoder.reset()

    def _remove(self, sequence: RunningSequence, sound: bool = True) -> None:
        self._slots.release(sequence, sound)
        if sequence in self._prompts:
            self._prompts.remove(sequence)
        self._waits.pop(sequence, None)

    def _fail(self, sequence: RunningSequence, error: Exception) -> None:
        sequence.output.fail(named(error, "the decoder engine"))
        self._remove(sequence, sound=False)

    # Prompts

    def _read_prompts(self) -> list[NewToken]:
        new: list[NewToken] = []
        left, read = self._max_num_tokens, set[RunningSequence]()
        while left and len(read) < _MOST_CHUNKS:
            sequence = self._oldest() if not read else self._shortest(read)
            if sequence is None:
                break
            most = left
            if not read:
                others = sum(p.unread for p in self._embedded() if p not in self._waits) - sequence.unread
                most = max(-(-left // 2), left - others)
            read.add(sequence)
            try:
                tokens, more = self._read_chunk(sequence, most)
            except Exception as error:
                self._fail(sequence, error)
                continue
            left -= tokens
            new += more
        return new

    def _oldest(self) -> RunningSequence | None:
        """The prompt that came first, or the one that it waits for."""
        embedded = self._embedded()
        if not embedded:
            return None
        oldest = embedded[0]
        return oldest if self._ready(oldest) else self._waits[oldest].leader

    def _shortest(self, read: set[RunningSequence]) -> RunningSequence | None:
        """The prompt with the least to read among those that this step has not read from and that wait for none."""
        candidates = sorted((prompt for prompt in self._embedded() if prompt not in read), key=lambda p: p.unread)
        return next((prompt for prompt in candidates if self._ready(prompt)), None)

    def _embedded(self) -> list[RunningSequence]:
        """Prompts whose embeddings are there. Where nothing else is to be done, all: the stream waits for them."""
        there = [prompt for prompt in self._prompts if prompt.slot is not None or prompt.ready.passed]
        if there or any(sequence.token is not None for sequence in self._slots.occupied):
            return there
        return self._prompts

    def _ready(self, sequence: RunningSequence) -> bool:
        """Whether a prompt has a slot or can have one; else it is better to wait for another prompt."""
        wait = self._waits.get(sequence)
        if wait is not None and not wait.over:
            return False
        self._waits.pop(sequence, None)
        place = None if sequence.slot is not None else self._slots.place(sequence)
        if isinstance(place, Wait):
            self._waits[sequence] = place
        return not isinstance(place, Wait)

    def _begin(self, sequence: RunningSequence) -> int:
        """Give a prompt its slot, with what it shares with another already in it; returns the slot."""
        place = self._slots.place(sequence)
        assert isinstance(place, Placement)  # _ready saw to that
        self._slots.occupy(place.slot, sequence)
        sequence.ready.wait(sequence.inputs_embeds)
        sequence.output.start()
        self._counters.started += 1
        self._counters.queue_seconds += sequence.output.timings.queue
        if place.source != place.slot:
            self._decoder.cache.copy_prefix(place.source, place.slot, place.shared)
        sequence.cached = sequence.output.reused_tokens = place.shared
        self._counters.prompt_tokens_reused += place.shared
        return place.slot

    def _read_chunk(self, sequence: RunningSequence, most: int) -> tuple[int, list[NewToken]]:
        """Read up to that many tokens of a prompt; returns their number, and the answer's first token at the end."""
        slot = self._begin(sequence) if sequence.slot is None else sequence.slot
        began = sequence.output.clock()
        chunk = slice(sequence.cached, min(sequence.cached + most, sequence.prompt_length))
        details = {"tokens": chunk.stop - chunk.start, "after": chunk.start}
        with self._observe(Stage("prefill", [sequence.output], slot, details=details)):
            step = self._decoder.step(
                slot, sequence.inputs_embeds[None, chunk], sequence.position_ids[:, None, chunk], [sequence.cached]
            )
        sequence.cached = chunk.stop
        whole = not sequence.unread
        tokens = self._sample([sequence], step.logits) if whole else []
        sequence.output.timings.prefill += sequence.output.clock() - began
        self._counters.prompt_tokens_computed += chunk.stop - chunk.start
        if whole:
            self._prompts.remove(sequence)
            sequence.inputs_embeds = sequence.inputs_embeds.new_empty(0)  # hundreds of megabytes in a full batch
        return chunk.stop - chunk.start, self._push([sequence], tokens) if whole else []

    # Answers

    def _decode(self, running: Sequence[RunningSequence]) -> list[NewToken]:
        """One token of each answer, which are in the order of their slots. Those that fail together get a try alone."""
        if not running:
            return []
        try:
            step = self._decode_rows(running)
        except Exception as error:
            if len(running) == 1:
                self._fail(running[0], error)
                return []
            self._counters.decode_retries += 1
            return [new for sequence in running for new in self._decode([sequence])]
        for sequence in running:
            sequence.cached += 1
        try:
            tokens = self._sample(running, step.logits, step.greedy)
        except Exception as error:
            for sequence in running:
                self._fail(sequence, error)
            return []
        return self._push(running, tokens)

    def _decode_rows(self, running: Sequence[RunningSequence]) -> Step:
        """A row for each that runs, of one call over the slots from the first to the last."""
        taking_part = {sequence.slot: sequence for sequence in running if sequence.slot is not None}
        slots = range(min(taking_part), max(taking_part) + 1)
        # A row between two running ones still takes part: what it writes lies beyond the tokens that its slot holds
        # or keeps (test_kept_prefixes_survive_their_neighbours), and its next request overwrites it.
        rows = [taking_part.get(slot) for slot in slots]
        tokens = [0 if s is None or s.token is None else s.token for s in rows]
        # On the host, like a prompt's: a runner puts them together with what else it sends.
        positions = torch.tensor([0 if s is None else s.cached + s.delta for s in rows])
        embeds = self._decoder.embed(tokens)[:, None]
        starts = [self._slots.held(slot) for slot in slots]
        outputs = [None if sequence is None else sequence.output for sequence in rows]
        with self._observe(Stage("decode", outputs, slots[0], details={"slots": len(rows)})):
            step = self._decoder.step(slots[0], embeds, positions.expand(3, -1)[:, :, None], starts)
        own = [number for number, sequence in enumerate(rows) if sequence is not None]
        if len(own) == len(rows):
            return step
        taken = to_device(own, step.logits.device)
        return step._replace(logits=step.logits[taken], greedy=None if step.greedy is None else step.greedy[taken])

    def _sample(
        self, sequences: Sequence[RunningSequence], logits: Tensor, greedy: Tensor | None = None
    ) -> list[int | None]:
        with self._observe(Stage("sampling")):
            if self._sampler is None:
                self._sampler = Sampler(self.slots, logits.shape[-1], logits.device)
            slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
            for slot, sequence in zip(slots, sequences, strict=True):
                if sequence.token is None:
                    self._sampler.start(slot, sequence.sampling, sequence.token_ids)
            return self._sampler(logits, slots, greedy).tolist()

    def _push(self, sequences: Sequence[RunningSequence], tokens: Sequence[int | None]) -> list[NewToken]:
        new, now = [], sequences[0].output.clock()
        for sequence, token in zip(sequences, tokens, strict=True):
            if token is None:
                assert sequence.slot is not None
                self._decoder.cache.clear(sequence.slot)  # whoever gets it next
                self._fail(sequence, ExecutionError(_NOT_FINITE))
                continue
            try:
                new.append(take_token(sequence, token, self._counters, now))
            except Exception as error:
                self._fail(sequence, error)
                continue
            if sequence.output.finished:
                self._remove(sequence)
        return new
