"""Streaming detokenisation, and stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from .sampler import Sampling

FinishReason = Literal["stop", "length", "deadline", "cancelled"]

_INCOMPLETE = "\ufffd"  # of bytes that are no whole character


class Decoder(Protocol):
    """The part of Transformers' tokenizers that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Decodes tokens one at a time, in whole characters.

    A character may span tokens, and some tokenizers treat the first token differently, so a token cannot be decoded
    alone. As in vLLM, a window starts at the last token that completed a character; what its text gains is new.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._known = ""  # the window's text that has been emitted
        self._known_tokens = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, possibly none."""
        self._window.append(token)
        text = self._decode(self._window)
        if text == self._known:  # a special token: a long run of them would grow the window
            self._window.pop()
            return ""
        # Shorter, if the decoder merges tokens into fewer characters.
        if len(text) <= len(self._known) or text.endswith(_INCOMPLETE):
            return ""
        new = text[len(self._known) :]
        del self._window[: self._known_tokens]
        self._known_tokens = len(self._window)
        self._known = self._decode(self._window)
        return new

    def flush(self) -> str:
        """The rest at the end of an answer; an incomplete character becomes U+FFFD."""
        new = self._decode(self._window)[len(self._known) :]
        self._window.clear()
        self._known, self._known_tokens = "", 0
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class StopStrings:
    """Passes text on up to the stop string that is complete first, without it.

    A possible beginning of a stop string is buffered, so the result does not depend on how the text is split.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._buffer = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what is safe to emit."""
        if self.stopped:
            return ""
        self._buffer += text
        found = [(start + len(stop), start) for stop in self._stop if (start := self._buffer.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, start = min(found)
            new, self._buffer = self._buffer[:start], ""
            return new
        keep = max((_overlap(self._buffer, stop) for stop in self._stop), default=0)
        cut = len(self._buffer) - keep
        new, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return new

    def flush(self) -> str:
        """The buffered text."""
        new, self._buffer = self._buffer, ""
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class AnswerStream:
    """Tokens and text of an answer, and why it ended.

    ``finish_reason`` is None while it runs, then ``"stop"`` (end-of-sequence token or stop string), ``"length"``
    (``max_tokens``) or the caller's. ``token_ids`` includes the end-of-sequence token, as Transformers does.
    """

    def __init__(self, tokenizer: Decoder, params: Sampling, eos_token_ids: Collection[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop)
        self._max_tokens = params.max_tokens
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """All that :meth:`push` has returned."""
        return "".join(self._pieces)

    def push(self, token: int, reason: FinishReason | None = None) -> str:
        """Add a token; returns new text. ``reason`` ends the answer here, unless it ends by itself.

        Raises:
            ValueError: the answer has ended.
        """
        if self.finish_reason is not None:
            raise ValueError(f"the answer has ended ({self.finish_reason})")
        self.token_ids.append(token)
        ended = token in self._eos
        new = "" if ended else self._stop_strings.push(self._detokenizer.push(token))
        if self._stop_strings.stopped or ended:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_tokens:
            self.finish_reason = "length"
        else:
            self.finish_reason = reason
        if self.finish_reason is not None and not self._stop_strings.stopped:
            # The last characters may complete a stop string, which is cut off in any case.
            new += self._stop_strings.push(self._detokenizer.flush())
            new += self._stop_strings.flush()
            if self._stop_strings.stopped:
                self.finish_reason = "stop"
        self._pieces.append(new)
        return new
