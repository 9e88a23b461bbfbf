"""The checkpoint's tokenizer and chat template, as Transformers loads them, in most cases without its import.

``tokenizer.json`` is complete for the library ``tokenizers``. Transformers adds what ``tokenizer_config.json`` and
older files say besides. Where they say nothing new, as in the published checkpoints, the file is read directly, which
takes a second less; everything else is loaded by Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .config import read_json
from .errors import CheckpointError
from .foreign import lacking

TOKENIZER_CONFIG = "tokenizer_config.json"
_NO_TEMPLATE = "has no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Transformers' ``SPECIAL_TOKENS_ATTRIBUTES``."""
_MORE = ("additional_special_tokens", "extra_special_tokens")
_WITHOUT_EFFECT = {
    "add_bos_token", "add_eos_token", "backend", "chat_template", "clean_up_tokenization_spaces", "errors", "is_local",
    "local_files_only", "model_max_length", "name_or_path", "padding_side", "processor_class", "split_special_tokens",
    "tokenizer_class", "truncation_side",
}  # fmt: skip
"""On the token ids of a text: beside a ``tokenizer.json``, or where a call says it anew."""
_OLDER = ("added_tokens.json", "special_tokens_map.json", "additional_chat_templates")


@dataclass
class ChatTokenizer:
    """What prompts need of a tokenizer.

    Attributes:
        backend_tokenizer: pads and truncates nothing.
        special_tokens_map: what chat templates may write, ``eos_token`` to ``<|im_end|>`` and so on.
        chat_template: Jinja, or several by name.
    """

    backend_tokenizer: Tokenizer
    special_tokens_map: Mapping[str, str]
    chat_template: Any

    def __post_init__(self) -> None:
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def get_chat_template(self, tools: Sequence[Any] | None = None) -> Any:
        """The template for conversations with or without tools; of several ``tool_use`` and ``default``, as there.

        Raises:
            ValueError: there are several, and none for this.
        """
        if not isinstance(self.chat_template, dict):
            return self.chat_template
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.chat_template:
                return self.chat_template[name]
        raise ValueError(f"multiple chat templates with no default: {', '.join(sorted(self.chat_template))}")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)


def check_tokenizer_files(folder: str | Path) -> None:
    """Check that a checkpoint has a tokenizer and a chat template, without reading either.

    Raises:
        CheckpointError: one of them is missing, or ``tokenizer_config.json`` cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise lacking(folder, "has no tokenizer: neither tokenizer.json nor vocab.json")
    file = template_file(folder)
    if file.name == TOKENIZER_CONFIG and not read_json(file).get("chat_template"):
        raise lacking(folder, _NO_TEMPLATE)


def template_file(folder: Path) -> Path:
    """The chat template's file, if any: the first that exists, as in Transformers."""
    files = (folder / name for name in ("chat_template.jinja", "chat_template.json"))
    return next((file for file in files if file.is_file()), folder / TOKENIZER_CONFIG)


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """The checkpoint's tokenizer, with the chat template that Transformers' processor would use.

    Raises:
        CheckpointError: no tokenizer, or no chat template.
    """
    folder = Path(folder)
    check_tokenizer_files(folder)
    file = next(folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file())
    try:
        tokenizer = read_directly(folder) or _by_transformers(folder)
    except Exception as error:  # corrupt files raise anything, even bare Exception from the Rust side
        for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
            read_json(folder / name)  # its error names the file that is no JSON
        raise CheckpointError(f"{file}: the tokenizer cannot be read: {' '.join(str(error).split())}") from None
    legacy = template_file(folder)
    if legacy.suffix == ".json" and legacy.name != TOKENIZER_CONFIG:
        try:
            tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{legacy} cannot be read: {error}") from None
    if not tokenizer.chat_template:  # an empty file
        raise CheckpointError(f"{folder} {_NO_TEMPLATE}")
    return tokenizer


def read_directly(folder: Path) -> ChatTokenizer | None:
    """The tokenizer of ``tokenizer.json``; None where another file may say more than it."""
    files = (folder / "tokenizer.json", folder / TOKENIZER_CONFIG)
    config = read_json(files[1])
    template = folder / "chat_template.jinja"
    source = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    named = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
    known = {*_NAMED, *_MORE, *_WITHOUT_EFFECT, "added_tokens_decoder", "add_prefix_space"}
    if (
        not all(file.is_file() for file in files)
        or any((folder / name).exists() for name in _OLDER)
        or not isinstance(source, str | None)
        or config.get("add_prefix_space")
        or not config.keys() <= known
    ):
        return None
    tokenizer = Tokenizer.from_file(str(files[0]))
    if tokenizer.padding and "pad_token" not in named:  # Transformers takes the token of the padding
        return None
    added = tokenizer.get_added_tokens_decoder()
    specials = {token.content for token in added.values() if token.special}
    more = [_content(token) for name in _MORE for token in config.get(name) or ()]
    again = config.get("added_tokens_decoder") or {}
    if {*named.values(), *more} <= specials and all(
        added.get(int(index)) == AddedToken(**token) for index, token in again.items()
    ):
        return ChatTokenizer(tokenizer, named, source)
    return None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _by_transformers(folder: Path) -> ChatTokenizer:
    load: Any
    if (folder / "tokenizer.json").is_file():  # complete in itself; AutoTokenizer takes two seconds more to import
        from transformers import PreTrainedTokenizerFast

        load = PreTrainedTokenizerFast.from_pretrained
    else:
        from transformers import AutoTokenizer

        load = partial(AutoTokenizer.from_pretrained, trust_remote_code=False)  # by default it asks on the terminal
    found = load(folder, local_files_only=True)
    return ChatTokenizer(found.backend_tokenizer, found.special_tokens_map, found.chat_template)
