"""Sampling of tokens from logits.

Settings have the order and meaning of Transformers' logits processors: repetition penalty (over prompt and answer),
temperature, top-k, top-p. Each sequence has its own random generator, so its answer does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.errors import SamplingError
from qwen2vl_trt.messages import LONE_SURROGATE
from qwen2vl_trt.transfer import to_device

_GREEDY_TEMPERATURE = 1e-5  # as in vLLM
_CANDIDATES = 1024  # of top-p, before all tokens are sorted
_BROKEN = -1  # marks a row whose logits are not finite

PENALTIES = (1e-4, 1e4)
"""Minimum and maximum of ``repetition_penalty``; beyond, logits overflow."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of a request.

    None takes the value of the checkpoint's ``generation_config.json``, or without one the default in brackets.

    Attributes:
        max_tokens: most tokens of the answer, at least 1 [256, or what the prompt leaves].
        temperature: divides the logits; up to 1e-5 is greedy [0].
        top_p: keep the likeliest tokens that together reach this probability; in (0, 1] [1, all].
        top_k: keep this many of the likeliest tokens [0, all].
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely [1, off].
        seed: of the random draws, 0 to 2**63 - 1; None takes a fresh one.
        stop: a string, or strings, that end the answer and are not part of it [none].
        ignore_eos: go on after an end-of-sequence token (for timing).

    Raises:
        SamplingError: a value is out of range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, (valid, allowed) in _ALLOWED.items():
            value = getattr(self, name)
            if not valid(value) and (value is not None or name == "ignore_eos"):
                raise SamplingError(f"{name} is {value!r}; it must be {allowed}")
        if self.stop is not None:
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    def with_defaults(self, defaults: SamplingParams | None = None) -> Sampling:
        """Replace None by the value in ``defaults``, else by the default in brackets."""
        values = {
            name: value
            for source in (defaults, self)
            if source is not None
            for name, value in vars(source).items()
            if value is not None
        }
        return Sampling(**values, max_tokens_given=self.max_tokens is not None)


@dataclass(frozen=True)
class Sampling:
    """:class:`SamplingParams` without None.

    Attributes:
        max_tokens_given: by the request; otherwise ``max_tokens`` may be lowered to what the prompt leaves.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    max_tokens_given: bool = True

    @property
    def greedy(self) -> bool:
        return self.temperature <= _GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1


def _is_number(value: Any, low: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= low


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low


def _are_texts(value: Any) -> bool:
    texts = (value,) if isinstance(value, str) else value
    return isinstance(texts, Sequence) and all(
        isinstance(text, str) and text and not LONE_SURROGATE.search(text) for text in texts
    )


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda value: _is_int(value, 1), "a whole number of at least 1"),
    "temperature": (lambda value: _is_number(value, 0), "a finite number of at least 0"),
    "top_p": (
        lambda value: _is_number(value, 0) and 0 < value <= 1,
        "a number above 0 and up to 1 (1 keeps all tokens)",
    ),
    "top_k": (lambda value: _is_int(value, 0), "a whole number of at least 0 (0 keeps all tokens)"),
    "repetition_penalty": (
        lambda value: _is_number(value, PENALTIES[0]) and value <= PENALTIES[1],
        f"a number from {PENALTIES[0]:g} to {PENALTIES[1]:g} (1 is off)",
    ),
    "seed": (lambda value: _is_int(value, 0) and value < 2**63, "None or a whole number from 0 to 2**63 - 1"),
    "stop": (_are_texts, "strings that are not empty and have no lone surrogate"),
    "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
}


class SequenceSampling:
    """Random generator and seen tokens of one sequence.

    Args:
        params: its settings.
        prompt_ids: the prompt with its image tokens, which Transformers penalises too.
        vocab_size: V, the width of the logits.
        device: of the logits.

    Raises:
        ValueError: a prompt token outside the vocabulary.
    """

    def __init__(
        self, params: Sampling, prompt_ids: Iterable[int], vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.params = params
        # On the CPU, so that a seed means the same draws on every device.
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen = set(prompt_ids) if params.penalised else set()
        outside = [token for token in self._seen if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"prompt token {outside[0]} is outside the vocabulary of {vocab_size}")
        self.seen = to_device(sorted(self._seen), torch.device(device), torch.long)

    def draw(self) -> float:
        """The next random number, in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def observe(self, token: int) -> None:
        """Add a token of the answer."""
        if self.params.penalised and token not in self._seen:
            self._seen.add(token)
            self.seen = torch.cat([self.seen, to_device([token], self.seen.device, torch.long)])


def sample(logits: Tensor, sequences: Sequence[SequenceSampling], greedy: Tensor | None = None) -> list[int | None]:
    """Sample the next token of every row, and add it to the row's sequence.

    The host waits for the device once; twice in the rare step where a row's top-p needs more than the first candidates.

    Args:
        logits: ``[B, V]`` FP32 on any device; not changed.
        sequences: of the B rows.
        greedy: ``[B]`` argmax, if the engine has computed it.

    Returns:
        B token ids; None for a row whose largest logit is NaN or infinite.

    Raises:
        ValueError: the numbers of rows and sequences differ.
    """
    if len(sequences) != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(sequences)} sequences")
    scores = penalise(logits, sequences)
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if drawn:
        tokens = _sample_mixed(scores, sequences, drawn)
    else:
        likeliest = scores.argmax(dim=-1) if greedy is None or scores is not logits else greedy
        largest = scores.gather(-1, likeliest[:, None])[:, 0]  # argmax returns a NaN if there is one
        tokens = _mark_broken(likeliest, largest).tolist()
    found = [None if token == _BROKEN else token for token in tokens]
    for sequence, token in zip(sequences, found, strict=True):
        if token is not None:
            sequence.observe(token)
    return found


def _mark_broken(tokens: Tensor, largest: Tensor) -> Tensor:
    """The tokens ``[B]``, or ``_BROKEN`` where the largest logit is not finite."""
    return tokens.masked_fill(~largest.isfinite(), _BROKEN)


def _sample_mixed(scores: Tensor, sequences: Sequence[SequenceSampling], drawn: Sequence[int]) -> list[int]:
    """Tokens of all rows; the rows ``drawn`` are not greedy."""
    device = scores.device
    params = [sequences[row].params for row in drawn]
    uniforms = [sequences[row].draw() for row in drawn]
    picked = scores if len(drawn) == len(sequences) else scores[to_device(drawn, device)]
    probabilities, enough = _distribution(picked, params, _CANDIDATES)
    largest = picked.amax(dim=-1)
    tokens = _mark_broken(_draw(probabilities, uniforms), largest)
    found = torch.stack([tokens, (enough | ~largest.isfinite()).long()])
    if picked is not scores:
        largest, likeliest = scores.max(dim=-1)
        likeliest = _mark_broken(likeliest, largest)
        both = torch.stack([likeliest, torch.ones_like(likeliest)])
        found = both.index_copy_(1, to_device(drawn, device), found)
    chosen, known = found.tolist()
    again = [index for index, row in enumerate(drawn) if not known[row]]
    if again:
        picked = picked[to_device(again, device)]
        probabilities = distribution(picked, [params[index] for index in again])
        wider = _draw(probabilities, [uniforms[index] for index in again]).tolist()
        for index, token in zip(again, wider, strict=True):
            chosen[drawn[index]] = token
    return chosen


def penalise(logits: Tensor, sequences: Sequence[SequenceSampling]) -> Tensor:
    """Apply each row's repetition penalty to ``[B, V]``; returns the same tensor if no row has one."""
    if not any(sequence.params.penalised for sequence in sequences):
        return logits
    result = logits.clone()
    for row, sequence in zip(result, sequences, strict=True):
        if sequence.params.penalised:
            penalty = sequence.params.repetition_penalty
            scores = row[sequence.seen]
            row[sequence.seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return result


def distribution(scores: Tensor, params: Sequence[Sampling]) -> Tensor:
    """Probabilities ``[B, V]`` of penalised scores ``[B, V]``, both FP32, after temperature, top-k and top-p."""
    return _distribution(scores, params, scores.shape[-1])[0]


def _distribution(scores: Tensor, params: Sequence[Sampling], candidates: int) -> tuple[Tensor, Tensor]:
    """The same, and for each row ``[B]`` whether it is right: whether top-p had enough candidates."""
    scores = scores / _column(scores, [row.temperature for row in params])
    scores = _apply_top_k(scores, params)
    scores, enough = _apply_top_p(scores, params, min(candidates, scores.shape[-1]))
    return scores.softmax(dim=-1), enough


def _apply_top_k(scores: Tensor, params: Sequence[Sampling]) -> Tensor:
    sizes = [min(row.top_k or scores.shape[-1], scores.shape[-1]) for row in params]
    limited = [size for size in sizes if size < scores.shape[-1]]
    if not limited:
        return scores
    best = scores.topk(max(limited), dim=-1).values  # [B, K]
    positions = to_device([min(size, max(limited)) - 1 for size in sizes], scores.device)
    threshold = best.gather(-1, positions[:, None])  # [B, 1]
    unlimited = to_device([size == scores.shape[-1] for size in sizes], scores.device)
    return scores.masked_fill((scores < threshold) & ~unlimited[:, None], -torch.inf)


def _apply_top_p(scores: Tensor, params: Sequence[Sampling], candidates: int) -> tuple[Tensor, Tensor]:
    rows = [row for row, setting in enumerate(params) if setting.top_p < 1]
    enough = torch.ones(len(params), dtype=torch.bool, device=scores.device)
    if not rows:
        return scores, enough
    index = to_device(rows, scores.device)
    top_p = _column(scores, [params[row].top_p for row in rows], torch.float64)
    limited = scores[index]
    kept, known = _top_p_mask(limited, top_p, candidates)
    return scores.index_copy(0, index, limited.masked_fill(~kept, -torch.inf)), enough.index_copy_(0, index, known)


def _top_p_mask(scores: Tensor, top_p: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Tokens that top-p keeps, among the likeliest ones: sorting the whole vocabulary takes 20 times longer.

    A token stays if the likelier ones together have less than ``top_p``, which is Transformers' rule.

    Returns:
        The mask of ``scores [R, V]`` by ``top_p [R, 1]``, and for each row ``[R]`` whether the candidates were enough.
    """
    everything = candidates == scores.shape[-1]
    probabilities = scores.softmax(dim=-1)
    best, order = probabilities.sort(dim=-1, descending=True) if everything else probabilities.topk(candidates, dim=-1)
    reached = best.double().cumsum(dim=-1)
    kept = reached - best < top_p
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, kept)
    enough = reached[:, -1:] >= top_p
    if everything:  # even if rounding leaves the sum below top_p
        enough = torch.ones_like(enough)
    return mask, enough[:, 0]


def _draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Tokens ``[B]`` by inverse transform sampling with one uniform number each."""
    cumulative = probabilities.double().cumsum(dim=-1)  # [B, V]
    total = cumulative[:, -1:]
    drawn = _column(total, uniforms, torch.float64)
    # Strictly below the total, so that the token's probability is not 0.
    drawn = torch.minimum(drawn * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0]


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    return to_device(values, like.device, dtype or like.dtype)[:, None]
