"""Streaming detokenisation, and stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .sampling_params import Sampling

FinishReason = Literal["stop", "length", "deadline", "cancelled"]


_MOST_INCOMPLETE = 32
_CHARACTER = 4  # bytes of the longest, and so tokens


class Detokenizer:
    """Decodes tokens one at a time, in whole characters, without special tokens: ``DecodeStream`` and what it leaves.

    Pieces add up to the decoded whole with byte-level tokenizers, as all of Qwen are. Those with byte fallback change
    text that is out already where bytes are no character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        # It would keep them: work per token would grow in a long run of them.
        self._special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._incomplete: list[int] = []  # since the last whole character

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, possibly none."""
        if token in self._special:
            return ""
        new = self._stream.step(self._tokenizer, token)
        if new:
            self._incomplete.clear()
            return new
        self._incomplete.append(token)
        return self._give_up() if len(self._incomplete) % _MOST_INCOMPLETE == 0 else ""

    def _give_up(self) -> str:
        """The text of a long run that makes no character, which would be decoded again with every token."""
        last = self._incomplete[-_CHARACTER:]
        new, rest = (self._decode(tokens) for tokens in (self._incomplete[:-_CHARACTER], last))
        if new + rest != self._decode(self._incomplete):
            return ""  # a character may lie across
        self._stream, self._incomplete = DecodeStream(skip_special_tokens=True), []
        return new + "".join(map(self.push, last))

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def flush(self) -> str:
        """The rest at the end of an answer; an incomplete character becomes U+FFFD."""
        return self._decode(self._incomplete)


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
        cut = min(map(self._begun, self._stop), default=len(self._buffer))
        new, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return new

    def flush(self) -> str:
        """The buffered text."""
        new, self._buffer = self._buffer, ""
        return new

    def _begun(self, stop: str) -> int:
        """Where the end of the buffer begins that a stop string begins with; its length where there is none."""
        length = len(self._buffer)
        starts = range(max(0, length - len(stop) + 1), length)
        return next((start for start in starts if stop.startswith(self._buffer[start:])), length)


class AnswerStream:
    """Tokens and text of an answer, and why it ended.

    ``finish_reason`` is None while it runs, then ``"stop"`` (end-of-sequence or stop token, stop string), ``"length"``
    (``max_tokens``) or the caller's. ``token_ids`` includes the end-of-sequence token, as Transformers does.
    """

    def __init__(self, tokenizer: Tokenizer, params: Sampling, eos_token_ids: Collection[int]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop) if params.stop else None
        self._max_tokens = params.max_tokens
        self._eos = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def end(self, reason: FinishReason) -> str:
        """End the answer without another token; returns the rest of its text."""
        stop, new = self._stop_strings, self._detokenizer.flush()
        self.finish_reason = reason
        return new if stop is None else stop.push(new) + ("" if stop.stopped else stop.flush())

    def push(self, token: int, reason: FinishReason | None = None) -> str:
        """Add a token; returns new text. ``reason`` ends the answer here, unless it ends by itself.

        Raises:
            ValueError: the answer has ended.
        """
        if self.finish_reason is not None:
            raise ValueError(f"the answer has ended ({self.finish_reason})")
        self.token_ids.append(token)
        if token in self._eos:
            new, reason = "", "stop"
        else:
            new = self._detokenizer.push(token)
            if len(self.token_ids) >= self._max_tokens:
                reason = "length"
        stop = self._stop_strings
        if reason is None and stop is None:
            return new
        # The last characters may complete a stop string, which is cut off in any case.
        if reason is not None:
            new += self._detokenizer.flush()
        if stop is not None:
            new = stop.push(new)
            if stop.stopped:
                reason = "stop"
            elif reason is not None:
                new += stop.flush()
        self.finish_reason = reason
        return new
