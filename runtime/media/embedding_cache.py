"""Vision embeddings by content, so that a picture that comes again is not seen again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from ..preprocessing.sizes import MediaSize


@dataclass(frozen=True)
class CachedEmbedding:
    """``embeds [tokens, C]`` on the engine's device, and the size that they are of."""

    embeds: Tensor
    size: MediaSize


class EmbeddingCache:
    """The most recently used embeddings, up to a number of bytes. Any thread may use it.

    Args:
        limit: bytes of all embeddings together; 0 keeps nothing.

    Attributes:
        nbytes: bytes held now.
        evictions: embeddings dropped to make room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.evictions = 0
        self._entries: OrderedDict[bytes, CachedEmbedding] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes) -> CachedEmbedding | None:
        """What is held under a key, which makes it the most recently used."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def store(self, key: bytes, entry: CachedEmbedding) -> None:
        """Keep a copy, unless it alone exceeds the limit; the least recently used make room."""
        if key in self._entries or entry.embeds.nbytes > self.limit:
            return
        # A copy: a view would keep the whole batch that it was computed in.
        entry = CachedEmbedding(entry.embeds.clone(), entry.size)
        with self._lock:
            self._entries[key] = entry
            self.nbytes += entry.embeds.nbytes
            while self.nbytes > self.limit:
                _, dropped = self._entries.popitem(last=False)
                self.nbytes -= dropped.embeds.nbytes
                self.evictions += 1

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0
