"""From messages to token ids, as ``Qwen2_5_VLProcessor`` of Transformers: template, tokenizer, image tokens repeated.

Unlike there, special tokens that a text spells are ordinary characters (:mod:`qwen2vl_trt.special_tokens`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from .chat_template import ChatTemplate
from .config import Qwen2VLConfig
from .errors import CheckpointError, LimitError, PromptError
from .messages import Message, checked_text, is_token_ids, to_messages, to_tools
from .special_tokens import SpecialTokenEscaper
from .tokenizer import load_tokenizer, template_file

Grid = Sequence[int]

_FEWEST_CHARACTERS = 65_536  # lower bound of a text's limit: some templates have long system messages
_CALL = {"type": "function", "function": {"name": "b", "arguments": {"c": "d"}}}
_TOOL = {"type": "function", "function": {"name": "b", "description": "b", "parameters": {"type": "object"}}}
_SYSTEM = {"role": "system"}
_SAMPLES = {"name": "b", "tool_calls": [_CALL], "reasoning_content": "b"}


@dataclass(frozen=True)
class Prompt:
    """Token ids, with an image or video token for each row of the vision output, and the rendered template.

    The text of a prompt of token ids is what they stand for.
    """

    token_ids: list[int]
    text: str


class PromptBuilder:
    """The prompts of one checkpoint; not thread-safe.

    Args:
        folder: checkpoint with tokenizer files and a chat template.
        config: its configuration.
        allow_special_tokens: special tokens that texts spell are such, as in Transformers.
        max_input_len: most tokens of a prompt, by default the model's; a text that must have more is not tokenized.
        chat_template: Jinja in place of the checkpoint's. Of a checkpoint with several, ``default`` is taken, and
            ``tool_use`` for conversations with tools, as in Transformers, or with calls.

    Raises:
        CheckpointError: no readable tokenizer, one of another model, or no chat template that writes a text, an image
            and a video.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Qwen2VLConfig,
        allow_special_tokens: bool = False,
        max_input_len: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(folder)
        if chat_template is not None:
            if not chat_template:
                raise CheckpointError("the chat template that was given is empty; give its text, or None")
            self.tokenizer.chat_template = chat_template
        backend = self.tokenizer.backend_tokenizer
        self._escaper = SpecialTokenEscaper(backend)
        self._allow_special_tokens = allow_special_tokens
        self._written: dict[tuple[ChatTemplate, str, str], bool] = {}
        ids = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        tokens = (backend.id_to_token(token_id) for token_id in ids if token_id is not None)
        self._media_tokens = sorted(token for token in tokens if token is not None)
        media = {"image": config.image_token_id, "video": config.video_token_id}
        for name, token_id in media.items():
            if backend.id_to_token(token_id) is None:
                raise CheckpointError(f"{folder}: the tokenizer lacks the {name} token {token_id} of config.json")
        # A token is some bytes of the text; composed (NFC), a text has more bytes than half its characters.
        self._most_tokens = most_tokens = max_input_len or config.text.max_position_embeddings
        characters = max(_FEWEST_CHARACTERS, 2 * max(map(len, backend.get_vocab())) * most_tokens)
        try:
            self._template, self._tool_template = (
                ChatTemplate(source, self.tokenizer.special_tokens_map, characters, most_tokens)
                for source in (self.tokenizer.get_chat_template(tools=tools) for tools in (None, [_TOOL]))
            )
            nothing, text = (self._dry_run({"type": "text", "text": text}) for text in ("", "a"))
            written = {name: self._dry_run({"type": name}) for name in media}
            if text == nothing:
                raise PromptError("it does not write the text of a message")
        except (PromptError, LimitError, ValueError) as error:
            where = template_file(Path(folder)) if chat_template is None else "the chat template that was given"
            raise CheckpointError(f"{where}: {error}") from None
        for name, token_id in media.items():
            if written[name] != nothing and written[name].count(token_id) != 1:
                token = backend.id_to_token(token_id)
                raise CheckpointError(
                    f"{folder}: {name}_token_id of config.json is {token_id}, the tokenizer's {token!r}, which the chat"
                    f" template does not write once for each {name}"
                )

    def build(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        image_grids: Sequence[Grid] = (),
        video_grids: Sequence[Grid] = (),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Prompt:
        """Token ids of a prompt; grids are ``(t, h, w)`` in patches, in order of appearance; tools are OpenAI's.

        Token ids have neither.

        Raises:
            PromptError: as :func:`~qwen2vl_trt.messages.to_messages` and ``to_tools``, the chat template refuses the
                messages or writes no tools, or one of the token ids is none of the vocabulary's, or the image or video
                token.
            LimitError: more text than ``max_input_len`` tokens stand for, or more token ids.
        """
        functions = to_tools(tools)
        if is_token_ids(prompt):
            if functions:
                raise PromptError("a prompt of token ids takes no tools; give messages, or leave the tools out")
            ids = self._checked_ids(prompt)
            return Prompt(ids, self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))
        messages = to_messages(prompt, len(image_grids), len(video_grids))  # type: ignore[arg-type]  # no ids
        called = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        template = self._tool_template if functions or called else self._template
        if "developer" not in template.source:  # OpenAI's newer name of the system
            messages = [message | _SYSTEM if message["role"] == "developer" else message for message in messages]
        self._check_written(template, messages, bool(functions))
        try:
            if self._allow_special_tokens:
                self._check_media_tokens([*messages, *({"content": [], "tool": tool} for tool in functions)])
            else:
                messages, functions = self._escaper.escape(messages), self._escaper.escape(functions)
        except RecursionError:
            raise PromptError("a tool or the arguments of a tool call are nested too deeply") from None
        try:
            escaped = self._render(template, messages, functions)
        except PromptError as error:  # it may quote a text
            raise PromptError(self._escaper.unescape_message(str(error))) from None
        text, ids = self._escaper.unescape(escaped), self._escaper.encode(escaped)
        ids = self._repeat(ids, self.config.image_token_id, "image", image_grids)
        ids = self._repeat(ids, self.config.video_token_id, "video", video_grids)
        return Prompt(ids, text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is, without the chat template; any thread may.

        Raises:
            PromptError: it is no text, or the tokenizer does not take it.
            LimitError: it is longer than ``max_input_len`` tokens stand for.
        """
        if not isinstance(text, str):
            raise PromptError(f"the prompt is {shown(text)}, not a string")
        self._template.check_length(len(checked_text(text, "the prompt")))
        encode = self._escaper.encode_plain if self._allow_special_tokens else self._escaper.encode_ordinary
        return encode(text)

    def _checked_ids(self, prompt: Sequence[Any]) -> list[int]:
        if len(prompt) > self._most_tokens:
            raise LimitError(
                f"the prompt has {len(prompt):,} token ids, more than {self._most_tokens:,} (--max-input-len). Shorten"
                " it, or rebuild."
            )
        size, media = self.config.text.vocab_size, (self.config.image_token_id, self.config.video_token_id)
        for number, token in enumerate(prompt, start=1):
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= int(token) < size:
                raise PromptError(
                    f"token {number} of the prompt is {shown(token)}; the model's vocabulary has 0 to {size - 1:,}"
                )
            if token in media:
                raise PromptError(
                    f"token {number} of the prompt is {token}, which stands for an image or a video; give a text or"
                    " messages with it"
                )
        return [int(token) for token in prompt]

    def _dry_run(self, part: dict[str, str]) -> list[int]:
        return self._escaper.encode_plain(self._render(self._template, [{"role": "user", "content": [part]}]))

    def _render(
        self, template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str:
        # A message of nothing but text goes in as a string: every chat template takes that.
        plain = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            if all(part["type"] == "text" for part in message["content"])
            else message
            for message in messages
        ]
        return template.render(plain, tools or None)

    def _check_media_tokens(self, messages: list[dict[str, Any]]) -> None:
        """An image token that no pixels belong to would shift every position after it."""
        texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
        texts += [json.dumps({**message, "content": None}, ensure_ascii=False) for message in messages]
        for token in self._media_tokens:
            if any(token in text for text in texts):
                raise PromptError(
                    f"the text contains {token!r}, which only the chat template may write;"
                    " mark an image's place with <image>, a video's with <video>"
                )

    def _check_written(self, template: ChatTemplate, messages: list[dict[str, Any]], tools: bool) -> None:
        """Refuse tools, roles and keys that the template does not write; they would be dropped without a word."""
        if tools and not self._writes(template, "", "tools"):
            raise PromptError(
                "the checkpoint's chat template does not write tools; give one that does (--chat-template)"
            )
        for number, message in enumerate(messages, start=1):
            role = message["role"]
            if role in ("developer", "tool") and not self._writes(template, role, "role"):
                raise PromptError(f"message {number}: the checkpoint's chat template does not write the role {role!r}")
            for key in _SAMPLES.keys() & message.keys():
                # A tool's name is that of the call that it answers.
                if (role, key) != ("tool", "name") and not self._writes(template, role, key):
                    raise PromptError(
                        f"message {number}: the checkpoint's chat template does not write {key!r}; leave it out"
                    )

    def _writes(self, template: ChatTemplate, role: str, key: str) -> bool:
        if (template, role, key) not in self._written:
            first, message = {"role": "user", "content": "a"}, {"role": role, "content": "a"}
            without: list[dict[str, Any]] = [first]
            with_it = without
            if key == "role":
                with_it = [first, message]
            elif key != "tools":
                without, with_it = [first, message], [first, message | {key: _SAMPLES[key]}]
            try:
                tools = [_TOOL] if key == "tools" else None
                written = template.render(with_it, tools) != template.render(without)
            except PromptError:
                written = True  # it looks at what it refuses
            self._written[template, role, key] = written
        return self._written[template, role, key]

    def _repeat(self, ids: list[int], token_id: int, kind: str, grids: Sequence[Grid]) -> list[int]:
        found = ids.count(token_id)
        if found != len(grids):
            raise PromptError(f"the chat template made {found} {kind} tokens of {len(grids)} {kind}s")
        counts = (math.prod(map(int, grid)) // self.config.vision.merge_unit for grid in grids)
        return [each for token in ids for each in [token] * (next(counts) if token == token_id else 1)]
