"""Special tokens such as ``<|im_end|>`` count only where the chat template writes them, not where a text spells them.

Before the template is rendered, one character of each special token (``|`` for Qwen's) is replaced in all texts by a
lone surrogate. The tokenizer then finds the template's special tokens alone; what is between them is unescaped and
tokenized with ``split_special_tokens=True``. Texts that spell no special token have Transformers' token ids, and so
have added tokens that are not called special (``<tool_call>``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from threading import Lock
from typing import Any

from tokenizers import Encoding, Tokenizer

from .errors import PromptError

_FIRST_STAND_IN = 0xD800  # lone surrogates, which to_messages refuses in texts
_BLANK = "\ufffd"  # in place of a stand-in, for the tokenizer


class SpecialTokenEscaper:
    """Escapes special tokens in texts for one tokenizer; any thread may."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._alone = tokenizer, Lock()
        added = tokenizer.get_added_tokens_decoder()
        specials = {index: token.content for index, token in added.items() if token.special}
        self._specials = frozenset(specials)
        self._spellings = re.compile("|".join(map(re.escape, specials.values())))
        self._stand_ins = {
            character: chr(_FIRST_STAND_IN + number) for number, character in enumerate(_characters(specials.values()))
        }

    def escape(self, value: Any) -> Any:
        """Replace the characters in a text, or in all texts of lists and dictionaries.

        Raises:
            RecursionError: they are nested too deeply.
        """
        if isinstance(value, str):
            for character, stand_in in self._stand_ins.items():
                value = value.replace(character, stand_in)
            return value
        if isinstance(value, dict):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        return [self.escape(item) for item in value] if isinstance(value, list) else value

    def unescape(self, text: str) -> str:
        """Undo :meth:`escape`."""
        for character, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, character)
        return text

    def unescape_message(self, message: str) -> str:
        """Undo :meth:`escape` in an error's message, where surrogates are spelled out."""
        for character, stand_in in self._stand_ins.items():
            message = message.replace(stand_in.encode("unicode_escape").decode(), character)
        return message

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered template whose texts are escaped.

        Raises:
            PromptError: the tokenizer does not take it.
        """
        plain = self.unescape(text)
        if self._spellings.findall(plain) == self._spellings.findall(text):
            return self.encode_plain(plain)  # no text spells one
        blank = text
        for stand_in in self._stand_ins.values():
            blank = blank.replace(stand_in, _BLANK)
        found = self._encode(blank, split=False)
        ids: list[int] = []
        end = 0
        for token, (first, after) in zip(found.ids, found.offsets, strict=True):
            if token in self._specials:
                ids += [*self.encode_ordinary(plain[end:first]), token]
                end = after
        return ids + self.encode_ordinary(plain[end:])

    def encode_plain(self, text: str) -> list[int]:
        """Token ids as Transformers has them, special tokens in texts included; raises as :meth:`encode`."""
        return self._encode(text, split=False).ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of a text, in which special tokens are ordinary characters; raises as :meth:`encode`."""
        return self._encode(text, split=True).ids if text else []

    def _encode(self, text: str, split: bool) -> Encoding:
        """With ``split``, the characters of special tokens are ordinary ones."""
        try:
            with self._alone:  # the setting is the tokenizer's until the next call
                self._tokenizer.encode_special_tokens = split
                # Of a batch, for ``encode`` holds Python's lock: the server would stand still over a long text.
                return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        except Exception as error:  # the Rust side raises bare Exception
            raise PromptError(f"the prompt cannot be tokenized: {' '.join(str(error)[:300].split())}") from None


def _characters(tokens: Iterable[str]) -> list[str]:
    """At least one character of each token; none that templates look for in texts, as in ``</think>``."""
    chosen: list[str] = []
    for token in tokens:
        if not any(character in token for character in chosen):
            chosen.append(next((one for one in token if not one.isalnum() and one not in "<>/_"), token[0]))
    return chosen
