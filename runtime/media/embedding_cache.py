"""Vision embeddings by content, so that a picture that comes again is not seen again."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from torch import Tensor

from ..preprocessing.sizes import MediaSize, Medium


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
        self._entries: OrderedDict[bytes, tuple[Tensor, MediaSize]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes) -> Medium | None:
        """What is embedded under a key, which makes it the most recently used."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
        embeds, size = entry
        return Medium(size, embeds=embeds, key=key)

    def store(self, key: bytes, embeds: Tensor, size: MediaSize) -> None:
        """Keep a copy of ``[tokens, C]``, unless it alone is over the limit; the least recently used make room."""
        if key in self._entries or embeds.nbytes > self.limit:
            return
        # A copy: a view would keep the whole batch that it was computed in.
        embeds = embeds.clone()
        with self._lock:
            self._entries[key] = embeds, size
            self.nbytes += embeds.nbytes
            while self.nbytes > self.limit:
                _, (dropped, _) = self._entries.popitem(last=False)
                self.nbytes -= dropped.nbytes
                self.evictions += 1

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0
