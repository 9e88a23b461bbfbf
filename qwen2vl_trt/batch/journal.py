"""Which rows a worker had in hand when it was lost.

Ray does a lost worker's partition again, as often as it takes. A row whose decoding or whose engine call kills the
process would keep it doing so for ever. So each attempt notes on the disk what it begins and ends; the next one
reads who was in hand when the notes broke off. Rows lost twice are taken one at a time from then on, and one that
was alone in hand and lost more often than allowed is given up.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from types import TracebackType

from qwen2vl_trt.errors import BatchError
from qwen2vl_trt.runtime.features.output_folder import writing

_LOST_TOGETHER = 2
"""Losses after which a row is taken alone."""


class Journal:
    """Notes of the attempts at one partition, until it is done; used in a ``with`` by one attempt.

    A row that was lost alone in hand, or a partition with nothing in hand, more than ``max_retries`` times is given up;
    the partition by a BatchError. Raises FeaturesError where the notes cannot be written.
    """

    def __init__(self, path: Path, max_retries: int) -> None:
        self._path, self._max_retries = path, max_retries
        self._lost: Counter[str] = Counter()
        self._lost_alone: Counter[str] = Counter()
        self._read()
        with writing(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self._file, b"\n")  # ends a line that was torn
        self._write("attempt", "")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def start(self, row: str) -> None:
        """A row is taken in hand; on any thread."""
        self._write("start", row)

    def finish(self, row: str) -> None:
        """A row has its result, or what is wrong with it is known."""
        self._write("finish", row)

    def alone(self, row: str) -> bool:
        """Whether a row is to be taken with no other in hand."""
        return self._lost[row] >= _LOST_TOGETHER

    def given_up(self, row: str) -> bool:
        """Whether a row has been lost so often that it is not tried again."""
        return self._lost_alone[row] > self._max_retries

    def losses(self, row: str) -> int:
        """Workers lost while the row was in hand."""
        return self._lost[row]

    def _write(self, event: str, row: str) -> None:
        os.write(self._file, (json.dumps([event, row]) + "\n").encode())  # one call: threads do not mix their lines

    def _read(self) -> None:
        hand: set[str] = set()
        attempts = idle = 0
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for line in [*lines, b'["attempt", ""]']:
            try:
                event, row = json.loads(line)
            except ValueError:  # torn
                continue
            if event == "start":
                hand.add(row)
            elif event == "finish":
                hand.discard(row)
            else:
                self._lost.update(hand)
                if len(hand) == 1:
                    self._lost_alone.update(hand)
                idle += attempts > 0 and not hand
                attempts, hand = attempts + 1, set()
        if idle > self._max_retries:
            raise BatchError(
                f"{self._path.stem}: its worker was lost {idle} times with no row in hand: out of memory, or a damaged"
                " table? --resume goes on"
            )
