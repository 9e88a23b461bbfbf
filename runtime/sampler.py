"""Sampling of tokens from logits, all rows in one pass.

Settings have the order and meaning of Transformers' logits processors: repetition penalty (over prompt and answer),
temperature, top-k, top-p, min-p; presence and frequency penalty (over the answer) follow the repetition penalty, as in
vLLM. A bias comes before the penalties, as in both. Of equal logits at the edge of top-p all stay, so that a draw does
not hang on how a sort orders them. Log-probabilities are those of the logits as they came.

A row's draw depends on its logits, its settings, its seed and the number of its draw, not on the rows beside it. The
host never waits: it knows the random numbers beforehand, and sends them with the settings in one copy.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_trt.transfer import to_device

from .request import TokenLogprobs
from .sampling_params import Sampling

_CANDIDATES = 1024  # of top-p, before all tokens are sorted
_OFF = -math.inf  # a threshold below every score

_ROW = np.dtype(
    [
        ("slot", np.int64),
        ("seen", np.int64),  # number of ids in its row of seen tokens
        ("top_k", np.int64),  # rank of the last one kept; the number of candidates where there is no top-k
        ("uniform", np.float64),
        ("top_p", np.float64),  # 2 where there is none
        ("repetition", np.float32),
        ("repetition_squared", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("temperature", np.float32),
        ("log_min_p", np.float32),
    ]
)
"""What travels to the device of each row."""

_WORDS = _ROW.itemsize // 8

_FIELDS: Any = _ROW.fields


class Rows:
    """The same on the device, by name, each ``[B, 1]``.

    Args:
        table: ``[B, 8]`` INT64, of :meth:`Sampler.stage`.
    """

    def __init__(self, table: Tensor) -> None:
        self._views = {np.dtype(np.int64): table}
        self._views |= {
            np.dtype(name): table.view(dtype) for name, dtype in (("f4", torch.float32), ("f8", torch.float64))
        }

    def __getitem__(self, name: str) -> Tensor:
        dtype, offset = _FIELDS[name][:2]
        place = offset // dtype.itemsize
        return self._views[dtype][:, place : place + 1]


class Plan(NamedTuple):
    """What the rows of a call use together; calls of one plan and size run the same operators.

    Attributes:
        repetition: a repetition penalty.
        counts: a presence or frequency penalty.
        draws: a row that is not greedy.
        temperature, top_k, top_p: one of them that is not off.
        min_p: one that is not off, or a greedy row beside drawn ones, which keeps its largest logit alone.
        all_candidates: top-p without top-k.
        bias: a bias of some tokens.
        width: of the seen tokens that are looked at, a power of two.
        candidates: how many of the largest logits filters look at first, a power of two or V; 0 without a filter.
        logprobs: how many of the likeliest are asked for; None computes no log-probabilities.
    """

    repetition: bool
    counts: bool
    draws: bool
    temperature: bool
    top_k: bool
    top_p: bool
    min_p: bool
    all_candidates: bool
    bias: bool
    width: int = 0
    candidates: int = 0
    logprobs: int | None = None


Kernel = Callable[[Tensor, Plan, Tensor, Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor]"]
"""Samples all rows in one launch, and notes the tokens among those seen and counted.

From biased logits ``[B, V]``, the plan, its table, seen ids ``[slots, N]``, counts ``[slots, V]`` and the mask of
:meth:`Sampler.__call__`; to tokens ``[B, 1]`` and totals ``[B, 1]`` as :class:`SampledTokens` has them.
"""

_USES = len(Plan._fields) - len(Plan._field_defaults)
_BIAS = Plan._fields.index("bias")


class SampledTokens:
    """Tokens of a call, on their way to the host.

    Args:
        tokens: ``[B]`` INT64 on the device; some valid id where the row is broken.
        total: ``[B, 1]``, NaN or infinite where the row is broken: its largest logit or the sum of its weights.
        logprobs: of :func:`_logprobs`.
    """

    def __init__(self, tokens: Tensor, total: Tensor, logprobs: Tensor | None = None) -> None:
        self.tokens, self._total, self._logprobs = tokens, total, logprobs
        if tokens.is_cpu:
            return
        # Token ids in FP32 or FP64, exact below 2**24; NaN where the other number is NaN or infinite, times 0.
        numbers = torch.add(tokens[:, None], total, alpha=0)
        if logprobs is not None:
            numbers = torch.cat([numbers, logprobs], dim=-1)
        self._host = numbers.to("cpu", non_blocking=True)  # of CUDA: into pinned memory
        self._copied = None
        if tokens.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def tolist(self) -> list[int | None]:
        """B token ids, None for a broken row; waits for this copy alone."""
        if self.tokens.is_cpu:
            pairs = zip(self.tokens.tolist(), self._total.tolist())
            return [token if math.isfinite(total) else None for token, (total,) in pairs]
        if self._copied is not None:
            self._copied.synchronize()
        return [int(token) if token == token else None for token in self._host[:, 0].tolist()]

    def logprobs(self, asked: Sequence[int | None]) -> list[TokenLogprobs | None]:
        """Of each row's token and as many of the likeliest as it asked for; only after :meth:`tolist`."""
        if self._logprobs is None:
            return [None] * len(asked)
        own = self._logprobs if self.tokens.is_cpu else self._host[:, 1:]
        found: list[TokenLogprobs | None] = []
        for number, (token, logprob, *top) in zip(asked, own.tolist(), strict=True):
            if number is None:
                found.append(None)
                continue
            ids, values = top[: len(top) // 2][:number], top[len(top) // 2 :][:number]
            found.append(TokenLogprobs(int(token), logprob, tuple(zip(map(int, ids), values))))
        return found


class Sampler:
    """Settings, random numbers and seen tokens of every slot.

    Args:
        max_num_seqs: number of slots.
        vocab_size: V, the width of the logits.
        device: of the logits.
        kernel: samples where a row is not greedy or has a penalty or a bias; None does it by PyTorch's operators.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device | str = "cpu", kernel: Kernel | None = None
    ) -> None:
        self._vocab_size, self._kernel = vocab_size, kernel
        self._device = torch.device(device)
        self._table = np.zeros((max_num_seqs, _WORDS), np.int64)
        self._rows = self._table.view(_ROW)[:, 0]
        self._uses = np.zeros((max_num_seqs, _USES), bool)  # Plan's
        self._asked = np.full(max_num_seqs, -1)  # log-probabilities; -1 is none
        self._batch: Sequence[int] = ()  # slots of the last call, unless settings have changed since
        self._keys = np.zeros(max_num_seqs, np.uint64)
        self._draws = np.zeros(max_num_seqs, np.uint64)
        # Ids of prompt and answer, then the first one again and again: equal ids have equal scores, so that writing
        # them twice is harmless, and this is far less to read than a mask of the vocabulary.
        self._seen = torch.zeros((max_num_seqs, 0), dtype=torch.long, device=self._device)
        self._counts = torch.zeros((0, vocab_size), device=self._device)  # [slots, V] of the answer, once it is needed
        # Biased ids, then 0 with a bias of 0.
        self._bias_ids = torch.zeros((max_num_seqs, 0), dtype=torch.long, device=self._device)
        self._bias = torch.zeros((max_num_seqs, 0), device=self._device)
        self._bits = to_device(1 << np.arange(32, dtype=np.int64), self._device).to(torch.int32)
        self._one = torch.ones((), device=self._device)

    def start(self, slot: int, params: Sampling, prompt_ids: Collection[int], answer_ids: Sequence[int] = ()) -> None:
        """Give a slot to a sequence.

        Args:
            slot: 0 to ``max_num_seqs`` - 1.
            params: its settings.
            prompt_ids: the prompt with its image tokens, which Transformers penalises too.
            answer_ids: tokens that it has drawn already, in another slot or before; its draws go on behind them.

        Raises:
            ValueError: see :func:`check_prompt`.
        """
        check_prompt(params, prompt_ids, self._vocab_size)
        drawn = not params.greedy
        top_k = params.top_k if drawn and 0 < params.top_k < self._vocab_size else 0
        top_p = params.top_p if drawn else 1.0
        min_p = params.min_p if drawn else 1.0
        seen = np.empty(0, np.int64)
        if params.penalised:
            seen = np.unique([*prompt_ids, *answer_ids])
            self._write_seen(slot, seen)
        if params.logit_bias or self._uses[slot, _BIAS]:
            self._write_bias(slot, params.logit_bias or {})
        counts = bool(params.presence_penalty or params.frequency_penalty)
        if counts:
            self._write_counts(slot, answer_ids)
        self._rows[slot] = (
            slot,
            len(seen),
            top_k - 1,
            0.0,
            top_p if top_p < 1 else 2.0,
            params.repetition_penalty,
            params.repetition_penalty**2,
            params.presence_penalty,
            params.frequency_penalty,
            min(params.temperature, torch.finfo(torch.float32).max) if drawn else 1.0,
            math.log(min_p) if min_p else _OFF,
        )
        self._uses[slot] = Plan(
            repetition=params.repetition_penalty != 1,
            counts=counts,
            draws=drawn,
            temperature=drawn and params.temperature != 1,
            top_k=top_k > 0,
            top_p=top_p < 1,
            min_p=min_p > 0,
            all_candidates=top_p < 1 and not top_k,
            bias=bool(params.logit_bias),
        )[:_USES]
        self._asked[slot] = -1 if params.logprobs is None else min(params.logprobs, self._vocab_size)
        self._batch = ()
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._keys[slot] = _mix(np.array([seed], np.uint64) + _GOLDEN)[0]
        self._draws[slot] = len(answer_ids)

    def __call__(
        self,
        logits: Tensor,
        slots: Sequence[int],
        greedy: Tensor | None = None,
        allowed: np.ndarray | None = None,
    ) -> SampledTokens:
        """Sample the next token of every row, and add it to the row's seen tokens.

        Args:
            logits: ``[B, V]`` FP32 on the device; not changed.
            slots: of the B rows, no two the same.
            greedy: ``[B]`` argmax, if the engine has computed it.
            allowed: bits ``[B, ceil(V / 32)]`` INT32 of the tokens that may be drawn; None allows all.

        Raises:
            ValueError: the numbers of rows and slots differ.
        """
        if len(slots) != logits.shape[0]:
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(slots)} slots")
        plan, table = self.stage(slots)
        if table is None and greedy is not None and plan.logprobs is None and allowed is None:
            return SampledTokens(greedy, logits.gather(-1, greedy.unsqueeze(1)))
        mask = None if allowed is None else to_device(allowed, self._device)
        return SampledTokens(*self.run(logits, plan, table, mask))

    def stage(self, slots: Sequence[int]) -> tuple[Plan, Tensor | None]:
        """What the host does of a call: its plan, and settings and random numbers of the rows on the device.

        Those are ``[B, 8]``, see :class:`Rows`; None where all rows are greedy without penalties.
        """
        if slots != self._batch:  # mostly it is the last call's
            self._batch, self._index = list(slots), np.asarray(slots)
            asked = int(self._asked[self._index].max())
            plan = Plan(*self._uses[self._index].any(0).tolist())
            self._plan = plan._replace(logprobs=None if asked < 0 else asked)
        plan, index = self._plan, self._index
        if not (plan.draws or plan.repetition or plan.counts or plan.bias):
            return plan, None
        table = self._table[index]
        staged = table.view(_ROW)[:, 0]
        width = candidates = 0
        if plan.repetition or plan.counts:
            width = 1 << int(staged["seen"].max()).bit_length()  # one more than are seen
            self._grow(width)
            self._rows["seen"][index] += self._uses[index, :2].any(1)  # those with a penalty
        if plan.draws:
            staged["uniform"] = uniforms(self._keys[index], self._draws[index]) * self._uses[index, 2]
            self._draws[index] += 1
            last = staged["top_k"]
            if plan.top_p:
                candidates = self._vocab_size if plan.all_candidates and self._device.type != "cpu" else _CANDIDATES
            if plan.top_k or plan.min_p:
                candidates = max(candidates, 1 << max(0, int(last.max())).bit_length())
            candidates = min(candidates, self._vocab_size)
            last[last < 0] = candidates
        return plan._replace(width=width, candidates=candidates), to_device(table, self._device)

    def run(
        self, logits: Tensor, plan: Plan, table: Tensor | None, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the device does of a call.

        Returns:
            As :class:`SampledTokens` takes them.
        """
        tokens, total = self._drawn(logits, plan, table, allowed)
        logprobs = None if plan.logprobs is None else _logprobs(logits, tokens, plan.logprobs)
        return tokens[:, 0], total, logprobs

    def _drawn(self, logits: Tensor, plan: Plan, table: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, 1]`` and totals ``[B, 1]``; of half the rows at a time where there is no memory for all."""
        try:
            if table is None:
                return _largest(self._masked(logits, allowed))
            rows = Rows(table)
            if self._kernel is None:
                return self._sample(logits, plan, rows, allowed)
            return self._kernel(self._biased(logits, plan, rows), plan, table, self._seen, self._counts, allowed)
        except torch.OutOfMemoryError:
            if len(logits) == 1:
                raise
        size = -(-len(logits) // 2)
        tables = (None, None) if table is None else table.split(size)
        masks = (None, None) if allowed is None else allowed.split(size)
        halves = [self._drawn(part, plan, *each) for part, *each in zip(logits.split(size), tables, masks)]
        first, second = map(torch.cat, zip(*halves))
        return first, second

    def _sample(self, logits: Tensor, plan: Plan, rows: Rows, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """What :data:`Kernel` does, and the bias, by PyTorch's operators."""
        scores = self._masked(self.penalise(logits, plan, rows), allowed)
        if plan.draws:
            tokens, total = _draw(weigh(scores, plan, rows), rows["uniform"])
        else:
            tokens, total = _largest(scores)
        if plan.width:
            self._seen.index_put_((rows["slot"], rows["seen"]), tokens)
            if plan.counts:
                self._counts.index_put_((rows["slot"], tokens), self._one, accumulate=True)
        return tokens, total

    def _masked(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        if allowed is None:
            return scores
        refused = (allowed[:, :, None] & self._bits) == 0  # [B, V / 32, 32]
        return scores.masked_fill(refused.view(len(scores), -1)[:, : self._vocab_size], _OFF)

    def _biased(self, logits: Tensor, plan: Plan, rows: Rows) -> Tensor:
        if not plan.bias:
            return logits
        slots = rows["slot"][:, 0]
        return logits.scatter_add(-1, self._bias_ids.index_select(0, slots), self._bias.index_select(0, slots))

    def penalise(self, logits: Tensor, plan: Plan, rows: Rows) -> Tensor:
        """Apply bias and penalties to ``[B, V]``; the same tensor if no row has one."""
        logits = self._biased(logits, plan, rows)
        if not plan.width:
            return logits
        ids = self._seen[:, : plan.width].index_select(0, rows["slot"][:, 0])  # [B, width]
        scores = logits.gather(-1, ids)
        if plan.repetition:
            # Divided by the penalty; where they are negative times its square, which multiplies them by it.
            scores = F.prelu((scores / rows["repetition"]).T, rows["repetition_squared"][:, 0]).T
        if plan.counts:
            counts = self._counts[rows["slot"], ids]
            scores = scores.addcmul(counts, rows["frequency"], value=-1)
            scores.addcmul_(counts.clamp_(max=1), rows["presence"], value=-1)
        return logits.scatter(-1, ids, scores)

    def _grow(self, width: int) -> None:
        slots, capacity = self._seen.shape
        if width > capacity:
            padding = self._seen[:, :1] if capacity else self._seen.new_zeros(slots, 1)
            self._seen = torch.cat([self._seen, padding.expand(-1, width - capacity)], dim=-1)

    def _write_bias(self, slot: int, bias: Mapping[int, float]) -> None:
        missing = len(bias) - self._bias.shape[1]
        if missing > 0:
            self._bias_ids, self._bias = (
                torch.nn.functional.pad(each, (0, missing)) for each in (self._bias_ids, self._bias)
            )
        ids, values = np.zeros(self._bias.shape[1], np.int64), np.zeros(self._bias.shape[1], np.float32)
        ids[: len(bias)], values[: len(bias)] = list(bias), list(bias.values())
        self._bias_ids[slot], self._bias[slot] = to_device(ids, self._device), to_device(values, self._device)

    def _write_seen(self, slot: int, ids: np.ndarray) -> None:
        if not len(ids):
            raise ValueError("a penalty needs a prompt of at least one token")
        self._grow(1 << len(ids).bit_length())
        row = np.full(self._seen.shape[1], ids[0])
        row[: len(ids)] = ids
        self._seen[slot] = to_device(row, self._device)

    def _write_counts(self, slot: int, answer_ids: Sequence[int]) -> None:
        if not len(self._counts):
            self._counts = self._counts.new_zeros(len(self._rows), self._vocab_size)
        self._counts[slot].zero_()
        if answer_ids:
            counts = np.bincount(np.asarray(answer_ids), minlength=self._vocab_size)
            self._counts[slot] = to_device(counts, self._device, torch.float32)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of ``[B, V]`` the first token with the largest score, and that score, ``[B, 1]``; NaN is the largest.

    ``Tensor.max`` of a dimension calls a CPU's other threads for two rows already, and where other processes keep the
    cores busy waits for them: 16 ms instead of 6 us of 8 rows of 512.
    """
    tokens = scores.argmax(dim=-1, keepdim=True)
    return tokens, scores.gather(-1, tokens)


def check_prompt(params: Sampling, prompt_ids: Collection[int], vocab_size: int) -> None:
    """Raise ValueError for a prompt token outside the vocabulary, where its logit would be looked up."""
    if params.penalised:
        for token in (min(prompt_ids, default=0), max(prompt_ids, default=0)):
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompt token {token} is outside the vocabulary of {vocab_size}")


def _logprobs(logits: Tensor, tokens: Tensor, number: int) -> Tensor:
    """Each row's token and its log-probability, then N ids and their log-probabilities: ``[B, 2 + 2N]`` FP32.

    Of half the rows at a time where there is no memory for all.
    """
    try:
        total = logits.logsumexp(dim=-1, keepdim=True)
        if not number:
            return torch.cat([tokens, logits.gather(-1, tokens) - total], dim=-1)
        top = logits.topk(number, dim=-1)
        return torch.cat([tokens, logits.gather(-1, tokens) - total, top.indices, top.values - total], dim=-1)
    except torch.OutOfMemoryError:
        if len(logits) == 1:
            raise
    size = -(-len(logits) // 2)
    return torch.cat([_logprobs(*parts, number) for parts in zip(logits.split(size), tokens.split(size))])


def weigh(scores: Tensor, plan: Plan, rows: Rows) -> Tensor:
    """Probabilities ``[B, V]`` FP32 but for a factor, of penalised scores after temperature, top-k, top-p and min-p.

    Every setting is a threshold: a score, not a list of tokens, so that ties are kept or dropped together.
    """
    if plan.temperature:
        scores = scores / rows["temperature"]
    if not plan.candidates:
        return scores.softmax(dim=-1)
    best, ids = _likeliest(scores, plan.candidates)
    if plan.top_k:
        scores = scores.masked_fill(scores < best.gather(-1, rows["top_k"]), _OFF)
    weights = scores.softmax(dim=-1)
    thresholds = []
    if plan.top_p:
        thresholds.append(_top_p_threshold(scores, weights, best, ids, rows["top_p"]))
    if plan.min_p:
        thresholds.append(best[:, :1] + rows["log_min_p"])
    if thresholds:
        weights.masked_fill_(scores < reduce(torch.maximum, thresholds), 0)
    return weights


def _likeliest(scores: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The largest of ``[B, V]`` in order and their ids, ``[B, candidates]``; to sort all takes 20 times longer.

    A setting that is off finds its threshold behind the scores, which are ``[B, candidates + 1]``.
    """
    if candidates == 1:
        ids, best = _largest(scores)
    elif candidates == scores.shape[-1]:
        best, ids = scores.sort(dim=-1, descending=True)
    else:
        best, ids = scores.topk(candidates, dim=-1)
    return F.pad(best, (0, 1), value=_OFF), ids


def _top_p_threshold(scores: Tensor, weights: Tensor, best: Tensor, ids: Tensor, top_p: Tensor) -> Tensor:
    """The score ``[B, 1]`` of the first of the likeliest tokens that together weigh enough.

    Args:
        scores: ``[B, V]``.
        weights: ``[B, V]``, their softmax.
        best: ``[B, candidates + 1]``, of :func:`_likeliest`.
        ids: ``[B, candidates]``, likewise.
        top_p: ``[B, 1]`` FP64; above 1 it is off.
    """
    reached = weights.gather(-1, ids).cumsum(dim=-1, dtype=torch.float64)
    threshold = best.gather(-1, (reached < top_p).sum(dim=-1, keepdim=True))
    if scores.is_cpu and ids.shape[-1] < scores.shape[-1]:  # elsewhere the plan has seen to it that they are enough
        enough = top_p.numpy()[:, 0]
        short = torch.from_numpy(np.flatnonzero((reached.numpy()[:, -1] < enough) & (enough < 1)))
        if len(short):
            wider = scores[short]
            threshold[short] = _top_p_threshold(
                wider, weights[short], *_likeliest(wider, wider.shape[-1]), top_p[short]
            )
    return threshold


def _draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, 1]`` by inverse transform sampling of ``[B, V]`` with a number ``[B, 1]`` each, and the total."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)  # [B, V]
    total = cumulative[:, -1:]
    # Below the total, as numbers have 52 bits, so that the token's weight is not 0.
    found = torch.searchsorted(cumulative, total * uniform, right=True)
    return found.clamp_(max=weights.shape[-1] - 1), total  # of NaN


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) with 52 bits, FP64: of each UINT64 key that with a number.

    SplitMix64 (Steele, Lea and Flood, 2014) from a state of its own for each key.
    """
    return (_mix(keys + (numbers + np.uint64(1)) * _GOLDEN) >> np.uint64(12)) * 2.0**-52


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
