"""Rows behind the interface that features of images have: fetched, noted in the journal, halved where memory ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen2vl_trt.errors import LimitError, MediaError, PromptError
from qwen2vl_trt.runtime.features.sources import DecoderFeatures, FeatureSource
from qwen2vl_trt.runtime.inputs.image_listing import ImageFile
from qwen2vl_trt.runtime.preprocessing.sizes import Medium
from qwen2vl_trt.runtime.request import Request

from .journal import Journal
from .rows import Row, is_uri, open_filesystem

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate memory", "bad allocation", "bad_alloc")
"""PyTorch on the CPU and ONNX Runtime have no exception of their own for it."""


@dataclass(frozen=True, eq=False)
class LoadedRow(Medium):
    """A decoded image with the row that it is of."""

    row: Row = field(kw_only=True)


class PromptedDecoderFeatures(DecoderFeatures):
    """The decoder's hidden states over each row's own prompt."""

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        requests = [
            Request(image.row.prompt or "", [*image.frames]) for image in images if isinstance(image, LoadedRow)
        ]
        return self._pipeline.hidden_states(requests)


class RowSource(FeatureSource):
    """Makes another source read rows.

    Args:
        source: what makes the features.
        max_tokens: image tokens of an engine call; where memory ends, half as many, and so on, until the worker ends.
    """

    def __init__(self, source: FeatureSource, max_tokens: int) -> None:
        self._source, self._max_tokens = source, max_tokens
        self._rows: dict[str | bytes, tuple[Row, Journal]] = {}
        self._fetched: dict[str | bytes, str | bytes] = {}

    def files(self, rows: Iterable[Row], journal: Journal) -> Iterator[ImageFile]:
        """The rows as files to load; one that is taken from the iterator waits until it is loaded."""
        for row in rows:
            self._rows[row.id] = row, journal
            yield ImageFile(row.id, row.id)

    def size(self, path: str | bytes, name: str) -> int:
        row, journal = self._rows[path]
        try:
            self._fetched[path] = image = fetch(row, journal)
        except MediaError:
            del self._rows[path]  # it will not be loaded
            raise
        return self._source.size(image, name)

    def load(self, path: str | bytes, name: str) -> Medium:
        row, _ = self._rows.pop(path)
        image = self._source.load(self._fetched.pop(path), f"row {row.id}")
        return LoadedRow(image.size, image.frames, row=row)

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        features: list[Tensor] = []
        waiting = list(images)
        while waiting:
            group = self._fitting(waiting)
            try:
                features += self._source.extract(group)
            except PromptError as error:  # of a row's own prompt: its neighbours are not lost
                raise MediaError(str(error)) from None
            except Exception as error:
                if not out_of_memory(error):
                    raise
                reason = str(error)
            else:
                waiting = waiting[len(group) :]
                continue
            self._shrink(group, reason)  # here, where the exception no longer holds the tensors of the call
        return features

    def _fitting(self, images: list[Medium]) -> list[Medium]:
        tokens = 0
        for count, image in enumerate(images):
            tokens += image.size.tokens
            if count and tokens > self._max_tokens:
                return images[:count]
        return images

    def _shrink(self, group: list[Medium], reason: str) -> None:
        tokens = sum(image.size.tokens for image in group)
        torch.cuda.empty_cache()
        if len(group) == 1:
            raise LimitError(
                f"out of memory with this row alone, {tokens:,} image tokens: lower --max-pixels ({reason})"
            )
        self._max_tokens = max(1, min(self._max_tokens, tokens) // 2)


def fetch(row: Row, journal: Journal) -> str | bytes:
    """Take a row in hand: its image, whose bytes are read if it is not on this machine; on any thread.

    Raises:
        MediaError: there is none, or it cannot be read.
    """
    journal.start(row.id)
    if row.fault is not None:
        raise MediaError(f"row {row.id}: {row.fault}")
    image = row.image
    assert image is not None
    if isinstance(image, bytes) or not is_uri(image) or image.startswith(("http://", "https://")):
        return image  # addresses are refused where images are loaded
    filesystem, path = open_filesystem(image)
    try:
        return bytes(filesystem.cat_file(path))
    except Exception as error:  # each store's client has exceptions of its own
        raise MediaError(f"row {row.id} ({image}): cannot be read: {error}") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the host or on the device, whichever library says so."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and out_of_memory(error.__cause__)
