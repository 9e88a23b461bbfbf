"""Structured answers: a JSON schema, a regular expression, a choice or a grammar that an answer follows.

llguidance compiles them and says before each token which tokens may come next: https://github.com/guidance-ai/llguidance.
Imports no PyTorch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.messages import LONE_SURROGATE

MOST_BYTES = 64 << 10
"""Of a schema, an expression, a grammar, or all choices together."""

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer

_LONGEST_REASON = 300  # llguidance shows the whole grammar

_JSON: dict[str, Any] = {
    "defaults": {"whitespace_pattern": r"(\n[ \t]{0,24}| )"},  # small models fall into it, and write nothing else
    "overrides": {"lenient": False, "coerce_one_of": False},  # what it cannot hold an answer to is an error
}

_DUMPS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

MOST_DEPTH = 32
"""Of the objects and arrays in a schema."""


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must look like, as in vLLM: exactly one of these.

    Attributes:
        json: a JSON schema, as text or as a mapping, which becomes text.
        json_object: any JSON object.
        regex: a regular expression in Rust's syntax (no look-around, no back-references) that the whole answer matches.
        choice: the answer is one of these texts.
        grammar: a context-free grammar in Lark's syntax, as llguidance has it, or in GBNF; it begins with ``start``
            (``root``).

    Raises:
        SamplingError: not exactly one, one of the wrong type, JSON that is malformed, above 64 KiB, or a schema more
            than 32 levels deep. What cannot be compiled is known later: it is the request's error.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        names = [each.name for each in fields(self)]
        given = [name for name in names if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise SamplingError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give exactly one of {', '.join(names)}"
            )
        (name,) = given
        value = getattr(self, name)
        if name == "json":
            value = _schema(value, "structured_outputs.json")
        elif name == "choice":
            wrong = isinstance(value, str) or not isinstance(value, Sequence) or not value
            if wrong or not all(isinstance(text, str) and text for text in value):
                raise SamplingError("structured_outputs.choice must be a list of texts that are not empty")
            value = tuple(value)
        elif name == "json_object":
            if value is not True:
                raise SamplingError(f"structured_outputs.json_object is {value!r}; it must be True or False")
        elif not isinstance(value, str) or not value:
            raise SamplingError(f"structured_outputs.{name} must be a text that is not empty")
        object.__setattr__(self, name, value)
        texts = value if name == "choice" else [] if name == "json_object" else [value]
        if any(map(LONE_SURROGATE.search, texts)):
            raise SamplingError(f"structured_outputs.{name} has a lone surrogate; give text that UTF-8 has")
        _check_size(sum(len(text.encode()) for text in texts), f"structured_outputs.{name}")

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(each.name for each in fields(self) if getattr(self, each.name))


def lark_json(schema: Any, where: str, blanks: bool = True) -> str:
    """A JSON schema as an expression of a grammar in Lark's syntax.

    Args:
        schema: text or a mapping.
        where: it is, for SamplingError.
        blanks: answers may differ from ``json.dumps`` in blanks and line ends.

    Raises:
        SamplingError: it is none, is above 64 KiB, is too deep, or cannot be compiled.
    """
    from llguidance import LLMatcher

    options = _JSON["overrides"] | (_JSON["defaults"] if blanks else _DUMPS)
    text = json.dumps(json.loads(_schema(schema, where)) | {"x-guidance": options})
    _check_size(len(text), where)
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    if problem:
        raise SamplingError(f"{where} cannot be compiled: {_short(problem)}")
    return f"%json {text}"


def _check_size(size: int, where: str) -> None:
    if size > MOST_BYTES:
        raise SamplingError(f"{where} has {size:,} bytes; most is {MOST_BYTES:,}. Shorten it")


def _schema(schema: Any, where: str) -> str:
    """A schema as text, with its type and its depth checked."""
    too_deep = SamplingError(f"{where} is nested more than {MOST_DEPTH} levels deep; make it flatter ($ref and $defs)")
    text = schema
    if isinstance(text, str):
        if len(text) > MOST_BYTES:
            return text  # which its caller refuses
        try:
            schema = msgspec.json.decode(text.encode("utf-8", "replace"))
        except RecursionError:
            raise too_deep from None
        except msgspec.DecodeError as error:
            raise SamplingError(f"{where} is no JSON: {error}") from None
    if not isinstance(schema, Mapping):
        raise SamplingError(f"{where} is a {type(schema).__name__}; a JSON schema is an object")
    level: list[Any] = [schema]
    for _ in range(MOST_DEPTH):
        level = [each for parent in level for each in _children(parent)]
    if any(isinstance(each, (Mapping, list, tuple)) for each in level):
        raise too_deep
    if isinstance(text, str):
        return text
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, UnicodeError) as error:
        raise SamplingError(f"{where} is no JSON: {error}") from None


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


class GrammarCompiler:
    """Makes matchers for one checkpoint's tokenizer, which llguidance reads with the first; any thread may.

    Args:
        tokenizer: of the checkpoint.
        vocab_size: V, the width of the logits.
        eos_token_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._read: LLTokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """Compile one; SamplingError where it cannot be compiled, with llguidance's reason."""
        from llguidance import LLMatcher

        try:
            found = LLMatcher(self._llguidance_tokenizer(), _grammar(params), log_level=0)
            problem = found.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise SamplingError(f"structured_outputs.{params.kind} cannot be compiled: {_short(problem)}")
        return Matcher(found, params.kind)

    def _llguidance_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._read is None:
                ends = list(self._eos_token_ids)
                wrapped = TokenizerWrapper(_OrdinaryTokenizer(self._tokenizer, self._vocab_size, ends[0]))
                self._read = LLTokenizer(wrapped, eos_token=ends)
        return self._read


class _OrdinaryTokenizer:
    """A tokenizer as llguidance's ``TokenizerWrapper`` takes it, whose texts have no added tokens.

    llguidance tokenizes text that a grammar leaves no choice of. Where that spells ``<tool_call>`` the token of that
    name is none of the text to it, and an end-of-sequence token would end the answer.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        self.eos_token_id = eos_token_id
        settings = json.loads(tokenizer.to_str()) | {"padding": None, "truncation": None}
        read = LLTokenizer(json.dumps(settings), vocab_size)
        self.tokens = [read.decode_bytes([token]) for token in range(vocab_size)]
        self.special_token_ids = [
            # llguidance shows a token that has no text by its number.
            token
            for token, text in enumerate(self.tokens)
            if read.is_special_token(token) or text == f"<[{token}]>".encode()
        ]
        ordinary = settings | {"added_tokens": [], "normalizer": None, "post_processor": None}
        self._encode = Tokenizer.from_str(json.dumps(ordinary)).encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids


class Matcher:
    """Where an answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, kind: str) -> None:
        self._matcher, self._kind = matcher, kind

    def fill(self, allowed: np.ndarray) -> None:
        """Write which tokens may come next: bits of ``[ceil(V / 32)]`` INT32. SamplingError beyond its limits."""
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        self._check()

    def push(self, token: int) -> None:
        """Go on by a token of the answer."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise SamplingError(f"structured_outputs.{self._kind}: {_short(self._matcher.get_error())}")


def _grammar(params: StructuredOutputsParams) -> str:
    """As llguidance reads it; raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    schema = '{"type": "object"}' if params.json_object else params.json
    if isinstance(schema, str):
        return LLMatcher.grammar_from_json_schema(schema, **_JSON)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        texts = (json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
    assert params.grammar is not None
    return grammar_from("grammar", params.grammar)


def _short(problem: str) -> str:
    problem = " ".join(problem.partition("<state>")[0].split())  # behind it is the parser's own
    return problem if len(problem) <= _LONGEST_REASON else f"{problem[:_LONGEST_REASON]}..."
