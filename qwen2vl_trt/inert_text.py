"""Texts that spell special tokens, such as ``<|im_end|>``, without becoming them.

A tokenizer takes a special token wherever it finds its spelling, so a text could end the user's turn and begin one of
the system's. Here a special token is one only where the chat template wrote it. To tell, one character of every special
token's spelling (``|`` for Qwen's) is exchanged in all texts for one that no text has, before the template is rendered.
The tokenizer then finds the template's special tokens alone. What lies between them is tokenized with the characters
put back and special tokens off, as ``split_special_tokens=True`` does in Transformers. For texts that spell no special
token the result is Transformers'. Added tokens that the tokenizer does not call special, such as ``<tool_call>`` and
``<|fim_prefix|>``, are tokens in texts too, as Transformers reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .errors import PromptError

_FIRST_STAND_IN = 0xD800  # lone surrogates: Unicode has no text with one, and to_messages refuses them
_BLANK = "\ufffd"  # takes a stand-in's place where the tokenizer looks for special tokens


class InertText:
    """Texts for one tokenizer.

    Args:
        tokenizer: Transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        specials = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._specials = frozenset(specials)
        self._spellings = re.compile("|".join(map(re.escape, specials.values())))
        self._stand_ins = {
            character: chr(_FIRST_STAND_IN + number) for number, character in enumerate(_characters(specials.values()))
        }

    def mark(self, value: Any) -> Any:
        """Exchange the characters in a text, or in all texts of lists and dictionaries.

        Raises:
            RecursionError: they are nested too deeply.
        """
        if isinstance(value, str):
            for character, stand_in in self._stand_ins.items():
                value = value.replace(character, stand_in)
            return value
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list) else value

    def unmark(self, text: str) -> str:
        """Put them back."""
        for character, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, character)
        return text

    def unmark_message(self, message: str) -> str:
        """Put them back in an error's message, which spells them out."""
        for character, stand_in in self._stand_ins.items():
            message = message.replace(stand_in.encode("unicode_escape").decode(), character)
        return message

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered template whose texts are marked.

        Raises:
            PromptError: the tokenizer does not take it.
        """
        plain = self.unmark(text)
        if self._spellings.findall(plain) == self._spellings.findall(text):
            return self.encode_plain(plain)  # no text spells one
        blank = text
        for stand_in in self._stand_ins.values():
            blank = blank.replace(stand_in, _BLANK)
        found = self._call(blank, split_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = []
        end = 0
        for token, (first, after) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token in self._specials:
                ids += [*self._ordinary(plain[end:first]), token]
                end = after
        return ids + self._ordinary(plain[end:])

    def encode_plain(self, text: str) -> list[int]:
        """Token ids as Transformers has them, every special token in the text included; raises as :meth:`encode`."""
        return self._call(text, split_special_tokens=False)["input_ids"]

    def _ordinary(self, text: str) -> list[int]:
        return self._call(text, split_special_tokens=True)["input_ids"] if text else []

    def _call(self, text: str, **options: Any) -> Any:
        try:
            return self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, **options)
        except Exception as error:  # the Rust side raises bare Exception
            raise PromptError(f"the prompt cannot be tokenized: {' '.join(str(error)[:300].split())}") from None


def _characters(tokens: Iterable[str]) -> list[str]:
    """One character of each token at least; not one that templates look for in texts, as in ``</think>``."""
    chosen: list[str] = []
    for token in tokens:
        if not any(character in token for character in chosen):
            chosen.append(next((one for one in token if not one.isalnum() and one not in "<>/_"), token[0]))
    return chosen
