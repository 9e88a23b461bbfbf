"""From a growing list of tokens to a growing text that never has to be taken back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from .sampling_params import Sampling

FinishReason = Literal["stop", "length", "deadline", "cancelled"]

_INCOMPLETE = "\ufffd"  # how a decoder writes bytes that are no whole character


class Decoder(Protocol):
    """The part of a tokenizer that is needed here; Transformers' tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Detokenizer:
    """Decodes tokens one at a time, never emitting half a character.

    Decoding everything again at each token costs the square of the answer's length, and decoding a token alone
    is wrong (a character may span tokens; some tokenizers treat the first token of a text differently). So a
    window slides along: it starts at the last token that completed a character, and what the window's text
    gains is the new text. This is how vLLM and Text Generation Inference do it.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._known = ""  # the window's text that was emitted before
        self._settled = 0  # tokens of the window that made it

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, often one token's, sometimes none."""
        self._window.append(token)
        text = self._decode(self._window)
        if text == self._known:  # a special token: forget it, or a long run of them would grow the window
            self._window.pop()
            return ""
        # Shorter: a decoder may still merge the window's tokens into fewer characters.
        if len(text) <= len(self._known) or text.endswith(_INCOMPLETE):
            return ""
        new = text[len(self._known) :]
        del self._window[: self._settled]
        self._settled = len(self._window)
        self._known = self._decode(self._window)
        return new

    def flush(self) -> str:
        """The rest at the end of an answer: a character that stays incomplete comes out as U+FFFD."""
        new = self._decode(self._window)[len(self._known) :]
        self._window.clear()
        self._known, self._settled = "", 0
        return new

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class StopStrings:
    """Passes text on until a stop string is complete.

    Text that may be the beginning of a stop string is held back until it is decided. Where several stop strings
    occur, the one that is complete first ends the text, so the outcome does not depend on how the text is cut
    into pieces. Neither it nor what follows comes out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; returns what is safe to emit."""
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, start = min(found)
            new, self._held = self._held[:start], ""
            return new
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        new, self._held = self._held[:cut], self._held[cut:]
        return new

    def flush(self) -> str:
        """What was held back in vain."""
        new, self._held = self._held, ""
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of ``stop``, but not all of it, that ends ``text``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class AnswerStream:
    """One answer as it grows: its tokens, its text, and why it ended.

    ``finish_reason`` is None while it runs, then ``"stop"`` (an end-of-sequence token or a stop string) or
    ``"length"`` (``max_tokens`` tokens) or what the caller of ``push`` says. ``token_ids`` has every token pushed,
    the end-of-sequence token included, as Transformers' ``generate`` returns it. The pieces that ``push`` returns add
    up to ``text``.
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
        """Everything emitted so far."""
        return "".join(self._pieces)

    def push(self, token: int, reason: FinishReason | None = None) -> str:
        """Add a token; returns the text to show now.

        Args:
            token: the next one.
            reason: end the answer with this token for this reason, unless it ends here of itself.

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
            # The last characters may complete a stop string: it is cut off, whatever ended the answer.
            new += self._stop_strings.push(self._detokenizer.flush())
            new += self._stop_strings.flush()
            if self._stop_strings.stopped:
                self.finish_reason = "stop"
        self._pieces.append(new)
        return new
