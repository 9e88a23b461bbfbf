"""From logits to tokens.

The order and the meaning of the settings are those of Transformers' logits processors: repetition penalty
(over prompt and answer), temperature, top-k, top-p. A sequence draws from its own random generator, so its
answer depends on its seed and its logits, never on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qwen2vl_trt.transfer import to_device

from .sampling_params import Sampling

_CANDIDATES = 1024  # of top-p at first
_BROKEN = -1  # in the place of a token, on its way to the host


class SequenceSampling:
    """What sampling remembers of one sequence: its generator and the tokens that it has seen.

    Args:
        params: the sequence's settings.
        prompt_ids: the whole prompt, image tokens included, as Transformers penalises them.
        vocab_size: V, the width of the logits.
        device: of the logits.

    Raises:
        ValueError: a prompt token outside the vocabulary.
    """

    def __init__(
        self,
        params: Sampling,
        prompt_ids: Iterable[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        # On the CPU whatever the device: a seed means the same draws everywhere.
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen = set(prompt_ids) if params.penalised else set()
        outside = [token for token in self._seen if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"prompt token {outside[0]} is outside the vocabulary of {vocab_size}")
        self.seen = to_device(sorted(self._seen), torch.device(device), torch.long)  # each token once

    def draw(self) -> float:
        """The next random number of this sequence, in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def observe(self, token: int) -> None:
        """Note a token of the answer."""
        if self.params.penalised and token not in self._seen:
            self._seen.add(token)
            self.seen = torch.cat([self.seen, to_device([token], self.seen.device, torch.long)])


def sample(logits: Tensor, sequences: Sequence[SequenceSampling], greedy: Tensor | None = None) -> list[int | None]:
    """Choose the next token of every row, and note it in the row's sequence.

    The host waits for the logits' device once, for all tokens together; once more in the rare step where a row's top-p
    reaches beyond the candidates that are looked at first.

    Args:
        logits: ``[B, V]`` FP32, any device; not changed.
        sequences: B of them, each with settings of its own.
        greedy: ``[B]`` the likeliest tokens, where the engine has found them already.

    Returns:
        B token ids; None for a row whose largest logit is NaN or infinite, which says that the model is broken.

    Raises:
        ValueError: the numbers of rows and of sequences differ.
    """
    if len(sequences) != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(sequences)} sequences")
    scores = penalise(logits, sequences)
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if drawn:
        tokens = _choose(scores, sequences, drawn)
    else:
        likeliest = scores.argmax(dim=-1) if greedy is None or scores is not logits else greedy
        largest = scores.gather(-1, likeliest[:, None])[:, 0]  # NaN counts as the largest, so no other is looked at
        tokens = _sound(likeliest, largest).tolist()
    found = [None if token == _BROKEN else token for token in tokens]
    for sequence, token in zip(sequences, found, strict=True):
        if token is not None:
            sequence.observe(token)
    return found


def _sound(tokens: Tensor, largest: Tensor) -> Tensor:
    """The tokens ``[B]``, but ``_BROKEN`` where the largest logit is no finite number; here, without a wait."""
    return tokens.masked_fill(~largest.isfinite(), _BROKEN)


def _choose(scores: Tensor, sequences: Sequence[SequenceSampling], drawn: Sequence[int]) -> list[int]:
    """Tokens of all rows, of which the ``drawn`` ones are not greedy."""
    device = scores.device
    params = [sequences[row].params for row in drawn]
    points = [sequences[row].draw() for row in drawn]
    picked = scores if len(drawn) == len(sequences) else scores[to_device(drawn, device)]
    probabilities, enough = _distribution(picked, params, _CANDIDATES)
    # What comes of logits that are no numbers may lie outside the vocabulary, and a wider look would not help it.
    broken = ~picked.amax(dim=-1).isfinite()
    found = torch.stack([_draw(probabilities, points).masked_fill(broken, _BROKEN), (enough | broken).long()])
    if picked is not scores:
        largest, likeliest = scores.max(dim=-1)
        likeliest = _sound(likeliest, largest)
        both = torch.stack([likeliest, torch.ones_like(likeliest)])
        found = both.index_copy_(1, to_device(drawn, device), found)
    tokens, known = found.tolist()
    again = [index for index, row in enumerate(drawn) if not known[row]]
    if again:
        picked = picked[to_device(again, device)]
        probabilities = distribution(picked, [params[index] for index in again])
        wider = _draw(probabilities, [points[index] for index in again]).tolist()
        for index, token in zip(again, wider, strict=True):
            tokens[drawn[index]] = token
    return tokens


def penalise(logits: Tensor, sequences: Sequence[SequenceSampling]) -> Tensor:
    """Apply each row's repetition penalty. ``[B, V]`` to ``[B, V]``; the same tensor where no row has one."""
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
    """The probabilities from which rows that are not greedy draw, after temperature, top-k and top-p.

    Args:
        scores: ``[B, V]`` FP32, penalised.
        params: B settings that are not greedy.

    Returns:
        ``[B, V]`` FP32; every row adds up to 1.
    """
    return _distribution(scores, params, scores.shape[-1])[0]


def _distribution(scores: Tensor, params: Sequence[Sampling], candidates: int) -> tuple[Tensor, Tensor]:
    """The same, and for each row ``[B]`` whether so many candidates for top-p were enough: if not, it is wrong."""
    scores = scores / _column(scores, [row.temperature for row in params])
    scores = _keep_top_k(scores, params)
    scores, enough = _keep_top_p(scores, params, min(candidates, scores.shape[-1]))
    return scores.softmax(dim=-1), enough


def _keep_top_k(scores: Tensor, params: Sequence[Sampling]) -> Tensor:
    sizes = [min(row.top_k or scores.shape[-1], scores.shape[-1]) for row in params]
    limited = [size for size in sizes if size < scores.shape[-1]]
    if not limited:
        return scores
    best = scores.topk(max(limited), dim=-1).values  # [B, K]
    positions = to_device([min(size, max(limited)) - 1 for size in sizes], scores.device)
    threshold = best.gather(-1, positions[:, None])  # [B, 1]
    unlimited = to_device([size == scores.shape[-1] for size in sizes], scores.device)
    return scores.masked_fill((scores < threshold) & ~unlimited[:, None], -torch.inf)


def _keep_top_p(scores: Tensor, params: Sequence[Sampling], candidates: int) -> tuple[Tensor, Tensor]:
    rows = [row for row, setting in enumerate(params) if setting.top_p < 1]
    enough = torch.ones(len(params), dtype=torch.bool, device=scores.device)
    if not rows:
        return scores, enough
    places = to_device(rows, scores.device)
    top_p = _column(scores, [params[row].top_p for row in rows], torch.float64)
    limited = scores[places]
    kept, known = _nucleus(limited, top_p, candidates)
    return scores.index_copy(0, places, limited.masked_fill(~kept, -torch.inf)), enough.index_copy_(0, places, known)


def _nucleus(scores: Tensor, top_p: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Which tokens top-p keeps, looking at the likeliest ones only: sorting a whole vocabulary takes 20 times longer.

    A token stays if those before it have less than ``top_p`` together, so the likeliest always does. That is
    Transformers' rule, which it counts from the other end.

    Args:
        scores: ``[R, V]``.
        top_p: ``[R, 1]`` in double precision.
        candidates: how many tokens to look at.

    Returns:
        The mask ``[R, V]``, and for each row ``[R]`` whether the candidates were enough to know.
    """
    everything = candidates == scores.shape[-1]
    probabilities = scores.softmax(dim=-1)
    best, order = probabilities.sort(dim=-1, descending=True) if everything else probabilities.topk(candidates, dim=-1)
    reached = best.double().cumsum(dim=-1)
    kept = reached - best < top_p
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, kept)
    enough = reached[:, -1:] >= top_p
    if everything:  # there are no others, even where rounding leaves the sum below top_p
        enough = torch.ones_like(enough)
    return mask, enough[:, 0]


def _draw(probabilities: Tensor, points: Sequence[float]) -> Tensor:
    """One token a row ``[B]`` by the inverse of its cumulative distribution: a random number each, on any device."""
    cumulative = probabilities.double().cumsum(dim=-1)  # [B, V]
    total = cumulative[:, -1:]
    drawn = _column(total, points, torch.float64)
    # Strictly below the total, so that the first sum beyond it belongs to a token whose probability is not 0.
    drawn = torch.minimum(drawn * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0]


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    return to_device(values, like.device, dtype or like.dtype)[:, None]
