"""Warnings of images and videos that were resized to fit the engines: few, however many there are."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

MOST_WARNINGS = 10
"""Of one pipeline."""


class FitWarnings:
    """A line for each of the first ones, then one that says where the others are told of."""

    def __init__(self) -> None:
        self._told = 0

    def tell(self, notes: Iterable[str]) -> None:
        """Log what has not been enough of yet."""
        for note in notes:
            self._told += 1
            if self._told <= MOST_WARNINGS:
                logger.warning("%s", note)
            elif self._told == MOST_WARNINGS + 1:
                logger.warning("more are resized to fit the engines; the sizes are in Output.images and Output.videos")
