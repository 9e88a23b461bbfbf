"""Which request has which part of the key-value cache, and what ended requests left there.

Whole blocks of tokens are known by their chained hashes, as in vLLM, whoever wrote them. :class:`SlotManager` is for a
cache of rows: a prompt goes on in a row that begins like it, or copies the beginning. :class:`PageManager` is for a
cache of pages, which are shared as they are.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..backends.common import KVCache
from ..backends.paged_cache import PAGE, PagedKVCache, pages_of
from .sequence import RunningSequence, block_hashes

_BLOCK = 16
"""Tokens of a block in a row, vLLM's default; the fewest for which a copy beats reading them."""


class Wait(NamedTuple):
    """A prompt that is being read will soon hold ``shared`` tokens of this one: cheaper than to read them twice."""

    leader: RunningSequence
    shared: int

    @property
    def over(self) -> bool:
        leader = self.leader
        return leader.slot is None or leader.cached >= self.shared or leader.output.finished


class KVCacheManager:
    """Gives requests their places in a decoder's cache; nothing in it is known at first.

    Args:
        slots: most requests at a time.
        block_size: tokens that a hash stands for.
        reuse: prompts share what they begin with.

    Attributes:
        block_size: likewise.
        preempts: there may be no memory for a running request, which then gives up what it has.
    """

    preempts: bool

    def __init__(self, slots: int, block_size: int, reuse: bool) -> None:
        self.block_size, self._reuse = block_size, reuse
        self._sequences: list[RunningSequence | None] = [None] * slots

    @property
    def kept_tokens(self) -> int:
        """Tokens of ended requests that may be used again."""
        raise NotImplementedError

    @property
    def usage(self) -> float:
        """Share of the rows or pages that running requests have, 0 to 1."""
        raise NotImplementedError

    @property
    def occupied(self) -> list[RunningSequence]:
        """The requests that have a slot, by slot."""
        return [sequence for sequence in self._sequences if sequence is not None]

    def add(self, sequence: RunningSequence) -> None:
        """Name a request's blocks, before all else; again after a preemption."""
        if self._reuse:
            sequence.hashes = block_hashes(sequence.keys, self.block_size, sequence.hashes)

    def wait(self, sequence: RunningSequence) -> Wait | None:
        """Whether a prompt without a slot had better wait for another one."""
        raise NotImplementedError

    def allocate(self, sequence: RunningSequence) -> bool:
        """Give a request a free slot, with what it shares with others in it; False if there is no memory now."""
        raise NotImplementedError

    def grow(self, sequence: RunningSequence) -> bool:
        """Make sure that one more token fits; False if there is no memory now."""
        return True

    def written(self, sequence: RunningSequence) -> None:
        """Note that ``sequence.cached`` has grown."""

    def release(self, sequence: RunningSequence, sound: bool = True) -> None:
        """Free a request's slot; what is ``sound`` is kept for others."""
        raise NotImplementedError

    def forget(self) -> None:
        """Keep nothing of ended requests any longer."""
        raise NotImplementedError

    def settle(self) -> None:
        """While nothing runs: give memory back that what is kept does not need."""

    def _usable(self, sequence: RunningSequence) -> list[bytes]:
        """The prompt's blocks that may be shared: not the last token, whose logits are wanted."""
        return sequence.hashes[: (len(sequence.token_ids) - 1) // self.block_size]

    def _written_hashes(self, sequence: RunningSequence, sound: bool) -> list[bytes]:
        """Names of what a request leaves in its slot."""
        if not (sound and self._reuse):
            return []
        return block_hashes(sequence.known_keys(), self.block_size, sequence.hashes)


def kv_cache_manager(cache: KVCache | PagedKVCache, slots: int, reuse: bool) -> KVCacheManager:
    """What fits a cache. Without ``reuse`` prompts share nothing."""
    return PageManager(cache, reuse) if isinstance(cache, PagedKVCache) else SlotManager(cache, slots, reuse)


class SlotManager(KVCacheManager):
    """For a cache of rows. A slot is a row of ``max_seq_len`` tokens, so a free one is always enough."""

    preempts = False

    def __init__(self, cache: KVCache, slots: int, reuse: bool = True) -> None:
        super().__init__(slots, _BLOCK, reuse)
        self._cache = cache
        self._hashes: list[list[bytes]] = [[] for _ in range(slots)]  # of each slot's tokens, those to come included
        self._slots_of: dict[bytes, dict[int, None]] = {}
        self._kept = np.zeros(slots, np.int64)  # tokens of a free slot that may be used again
        self._free_since = np.zeros(slots, np.int64)  # a count of releases; -1 of a slot in use
        self._releases = 0

    @property
    def kept_tokens(self) -> int:
        return int(self._kept.sum())

    @property
    def usage(self) -> float:
        return len(self.occupied) / len(self._sequences)

    def held(self, slot: int) -> int:
        """Tokens in a slot that must stay as they are."""
        sequence = self._sequences[slot]
        return int(self._kept[slot]) if sequence is None else sequence.cached

    def wait(self, sequence: RunningSequence) -> Wait | None:
        return self._match(sequence)[2]

    def allocate(self, sequence: RunningSequence) -> bool:
        source, shared, _ = self._match(sequence)
        # In place where at least half of what is kept is shared: little is lost.
        if shared and self._sequences[source] is None and 2 * shared >= self._kept[source]:
            slot = source
        else:
            slot = self._free_slot(but=source if shared else -1)
            self._register(slot, [])  # if the copy fails, what it kept may be lost
            self._kept[slot] = 0
            if shared:
                self._cache.copy_prefix(source, slot, shared)
        self._register(slot, sequence.hashes)
        self._sequences[slot], self._kept[slot], self._free_since[slot] = sequence, 0, -1
        sequence.slot, sequence.cached = slot, shared
        return True

    def release(self, sequence: RunningSequence, sound: bool = True) -> None:
        slot = sequence.slot
        assert slot is not None
        self._releases += 1
        self._register(slot, self._written_hashes(sequence, sound))
        if not sound:
            self._cache.clear(slot)  # it may hold NaN, which whoever gets it next would see
        self._sequences[slot], self._free_since[slot] = None, self._releases
        self._kept[slot] = len(self._hashes[slot]) * _BLOCK
        sequence.slot = None

    def forget(self) -> None:
        for slot, sequence in enumerate(self._sequences):
            if sequence is None:
                self._register(slot, [])
        self._kept[:] = 0

    def settle(self) -> None:
        self._cache.trim(int(self._kept.max()))

    def make_neighbours(self, sequences: Sequence[RunningSequence]) -> None:
        """Move requests to slots that lie side by side: one call of an engine over rows takes no others."""
        slots = sorted(sequence.slot for sequence in sequences if sequence.slot is not None)
        if slots[-1] - slots[0] == len(slots) - 1:
            return
        moves = [(self._moved(first, slots), first) for first in range(len(self._sequences) - len(slots) + 1)]
        first = min(moves)[1]
        window = range(first, first + len(slots))
        outside = [slot for slot in slots if slot not in window]
        for slot in window:
            if slot not in slots:
                self._swap(slot, outside.pop())

    def _moved(self, first: int, slots: Sequence[int]) -> int:
        window = set(range(first, first + len(slots)))
        return sum(self.held(slot) + 1 for slot in window.symmetric_difference(slots))

    def _swap(self, one: int, other: int) -> None:
        self._cache.swap(one, other, max(self.held(one), self.held(other)))
        self._sequences[one], self._sequences[other] = self._sequences[other], self._sequences[one]
        for counts in (self._kept, self._free_since):
            counts[[one, other]] = counts[[other, one]]
        ours, theirs = self._hashes[one], self._hashes[other]
        self._register(one, [])
        self._register(other, ours)
        self._register(one, theirs)
        for slot in (one, other):
            sequence = self._sequences[slot]
            if sequence is not None:
                sequence.slot = slot

    def _match(self, sequence: RunningSequence) -> tuple[int, int, Wait | None]:
        """The slot that holds most of the prompt's beginning, how much, and whether it is better to wait."""
        hashes = self._usable(sequence)
        # A slot that holds a block holds all before it.
        depth = bisect_left(range(len(hashes)), True, key=lambda number: hashes[number] not in self._slots_of)
        source, shared, wait = -1, 0, None
        for count in range(depth, 0, -1):
            length = count * _BLOCK
            if length <= shared:
                break
            for slot in self._slots_of[hashes[count - 1]]:
                ready = min(length, self.held(slot))
                if ready > shared:
                    source, shared = slot, ready
                if ready == length:
                    break
                leader = self._sequences[slot]
                if wait is None and leader is not None and leader.reading:
                    wait = Wait(leader, length)
        if wait is not None and wait.shared < max(shared, wait.leader.cached) + _BLOCK:
            wait = None
        return source, shared, wait

    def _free_slot(self, but: int) -> int:
        """One that keeps nothing if there is one; then one next to those in use, or the one left longest ago.

        An engine over rows runs all from the first in use to the last.
        """
        free = np.flatnonzero(self._free_since >= 0)
        if not len(free):
            raise ValueError(f"all {len(self._sequences)} slots are taken")
        if len(free) > 1:
            free = free[free != but]
        used = np.flatnonzero(self._free_since < 0)
        span = np.maximum(free, used[-1]) - np.minimum(free, used[0]) if len(used) else np.zeros_like(free)
        order = np.lexsort((free, self._free_since[free], span, self._kept[free] > 0))
        return int(free[order[0]])

    def _register(self, slot: int, hashes: Sequence[bytes]) -> None:
        old = self._hashes[slot]
        same = 0
        while same < min(len(old), len(hashes)) and old[same] == hashes[same]:
            same += 1
        for name in old[same:]:
            del self._slots_of[name][slot]
            if not self._slots_of[name]:
                del self._slots_of[name]
        for name in hashes[same:]:
            self._slots_of.setdefault(name, {})[slot] = None
        self._hashes[slot] = list(hashes)


class PageManager(KVCacheManager):
    """For a cache of pages, which are given to requests one by one, and shared by those that begin alike."""

    preempts = True

    def __init__(self, cache: PagedKVCache, reuse: bool = True) -> None:
        slots = len(cache.block_table)
        super().__init__(slots, PAGE, reuse)
        self._cache = cache
        self._free_slots = list(range(slots))  # a heap
        self._pages: list[list[int]] = [[] for _ in range(slots)]
        self._written = [0] * slots  # whole pages of each slot whose tokens are there
        self._users = [0] * cache.pages
        self._names: list[bytes | None] = [None] * cache.pages
        self._writers: list[RunningSequence | None] = [None] * cache.pages  # who is going to write a named page
        self._page_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, cache.pages))  # least recently used first
        self._kept_pages = 0  # free ones with a name

    @property
    def kept_tokens(self) -> int:
        return self._kept_pages * PAGE  # counted: other threads ask

    @property
    def usage(self) -> float:
        return 1 - len(self._free) / (self._cache.pages - 1)  # page 0 is nobody's

    def wait(self, sequence: RunningSequence) -> Wait | None:
        pages = self._match(sequence)
        for count, page in enumerate(pages):
            writer = self._writers[page]
            if writer is not None:
                later = next((n for n in range(count, len(pages)) if self._writers[pages[n]] is not writer), len(pages))
                return Wait(writer, later * PAGE)
        return None

    def allocate(self, sequence: RunningSequence) -> bool:
        shared = []
        for page in self._match(sequence):
            if self._writers[page] is not None:
                break
            shared.append(page)
        total = pages_of(len(sequence.token_ids))
        if total - len(shared) > len(self._free) - sum(page in self._free for page in shared):
            return False
        if not self._free_slots:
            raise ValueError(f"all {len(self._sequences)} slots are taken")
        slot = heapq.heappop(self._free_slots)
        for page in shared:
            self._users[page] += 1
            if page in self._free:
                del self._free[page]
                self._kept_pages -= 1
        pages = shared + [self._take() for _ in range(total - len(shared))]
        for page, name in list(zip(pages, sequence.hashes))[len(shared) :]:
            if name not in self._page_of:
                self._name(page, name)
                self._writers[page] = sequence
        self._sequences[slot], self._pages[slot], self._written[slot] = sequence, pages, len(shared)
        self._cache.block_table[slot, :total] = pages
        sequence.slot, sequence.cached = slot, len(shared) * PAGE
        return True

    def grow(self, sequence: RunningSequence) -> bool:
        slot = sequence.slot
        assert slot is not None
        pages = self._pages[slot]
        if sequence.cached < len(pages) * PAGE:
            return True
        if not self._free:
            return False
        pages.append(self._take())
        self._cache.block_table[slot, len(pages) - 1] = pages[-1]
        return True

    def written(self, sequence: RunningSequence) -> None:
        slot = sequence.slot
        assert slot is not None
        whole = sequence.cached // PAGE
        for page in self._pages[slot][self._written[slot] : whole]:
            self._writers[page] = None
        self._written[slot] = whole

    def release(self, sequence: RunningSequence, sound: bool = True) -> None:
        slot = sequence.slot
        assert slot is not None
        hashes, pages = self._written_hashes(sequence, sound), self._pages[slot]
        if not sound:
            self._cache.clear([page for page in pages if self._users[page] == 1])
        for number in reversed(range(len(pages))):  # the last pages are reused first
            page = pages[number]
            if number < len(hashes):
                self._writers[page] = None
                if self._names[page] is None and hashes[number] not in self._page_of:
                    self._name(page, hashes[number])
            elif self._users[page] == 1:
                self._forget_name(page)
            self._users[page] -= 1
            if not self._users[page]:
                self._free[page] = None
                self._kept_pages += self._names[page] is not None
                self._free.move_to_end(page, last=self._names[page] is not None)
        self._sequences[slot], self._pages[slot] = None, []
        heapq.heappush(self._free_slots, slot)
        sequence.slot = None

    def forget(self) -> None:
        for page in self._free:
            self._forget_name(page)
        self._kept_pages = 0

    def _match(self, sequence: RunningSequence) -> list[int]:
        """Pages that hold the prompt's beginning, or will."""
        pages = []
        for name in self._usable(sequence):
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def _take(self) -> int:
        page, _ = self._free.popitem(last=False)
        self._kept_pages -= self._names[page] is not None
        self._forget_name(page)
        self._users[page] = 1
        return page

    def _name(self, page: int, name: bytes) -> None:
        self._names[page], self._page_of[name] = name, page

    def _forget_name(self, page: int) -> None:
        name = self._names[page]
        if name is not None:
            del self._page_of[name]
        self._names[page] = self._writers[page] = None
