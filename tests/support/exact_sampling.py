"""What a row's distribution is in FP64, and where rounding in FP32 may change a draw."""

import math

import numpy as np
import torch

from qwen2vl_trt.runtime.sampling_params import Sampling


class Exact:
    """Of a row of penalised scores ``[V]`` FP32, which has a finite one.

    Attributes:
        total: of the weights kept, 1 the largest.
        rounding: how far a share of the total may be off. A weight is exp(d) in FP32, d = score - largest: d and its
            product with log2(e) are rounded, each by |d| 2**-24 relative to the weight; the exponential by 2 units in
            the last place of the function that GPUs have. A softmax's quotient and sums are rounded by a few more.
            Weights below 2**-44 count as none.
    """

    def __init__(self, scores: torch.Tensor, params: Sampling) -> None:
        greedy = params.greedy
        temperature = 1.0 if greedy else min(params.temperature, float(torch.finfo(torch.float32).max))
        self._scores = (scores / torch.tensor(temperature)).numpy()
        vocab, best = len(self._scores), self._scores.max()
        distance = np.maximum(self._scores.astype(np.float64) - best, -1000)  # of -inf too: their weight is 0
        self._weights = np.exp(distance)
        order = np.sort(self._scores)[::-1]
        lowest = -math.inf if greedy or not 0 < params.top_k < vocab else order[params.top_k - 1]
        left = np.where(self._scores >= lowest, self._weights, 0)
        self.rounding = float((left * (16 - 2 * distance)).sum() / left.sum() * 2**-24 + vocab * 2**-44)
        min_p = 1.0 if greedy else params.min_p
        floor = best + np.float32(math.log(min_p)) if min_p else -math.inf
        top_p = 1.0 if greedy else params.top_p
        thresholds = [
            max(lowest, floor, self._nucleus(left, share))
            for share in (top_p, top_p * (1 - 2 * self.rounding), top_p * (1 + 2 * self.rounding) + 2**-44)
        ]
        self._thresholds = thresholds if top_p < 1 else [max(lowest, floor)]
        self._kept = [np.where(self._scores >= each, self._weights, 0) for each in self._thresholds]
        self.total = float(self._kept[0].sum())

    def _nucleus(self, weights: np.ndarray, share: float) -> float:
        """The first score, from the largest on, at which so much of the weight is reached."""
        order = np.argsort(-self._scores, kind="stable")
        reached = np.cumsum(weights[order])
        places = np.flatnonzero(reached >= share * reached[-1])
        return float(self._scores[order[places[0]]]) if len(places) else -math.inf

    def token(self, uniform: float) -> int:
        return self._drawn(self._kept[0], uniform)

    def near(self, uniform: float, times: int = 1) -> set[int]:
        """Tokens that rounding may lead to."""
        found = set[int]()
        for kept in self._kept:
            reached = np.cumsum(kept)
            edge = times * 2 * self.rounding * reached[-1]
            low, high = (self._drawn(kept, uniform + step / reached[-1]) for step in (-edge, edge))
            found |= {token for token in range(low, high + 1) if kept[token]}
        return found

    def certain(self, uniform: float, times: int = 1) -> bool:
        """Whether rounding can change neither what is kept nor what is drawn."""
        return len(set(self._thresholds)) == 1 and len(self.near(uniform, times)) == 1

    def _drawn(self, kept: np.ndarray, uniform: float) -> int:
        reached = np.cumsum(kept)
        last = int(np.flatnonzero(kept)[-1])
        return min(int(np.searchsorted(reached, max(uniform, 0.0) * reached[-1], side="right")), last)
