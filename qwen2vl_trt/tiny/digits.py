"""Real handwritten digits, split once into training and held-out digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qwen2vl_trt.errors import MissingDependencyError, pip_install

SPLIT_SEED = 20250115
HELD_OUT_FRACTION = 0.2


@dataclass(frozen=True)
class Digits:
    """Handwritten digits of one half of the split.

    Attributes:
        images: ``[n, 8, 8]`` float32, ink from 0 to 1.
        labels: ``[n]`` int64.
        indices: ``[n]`` row of each digit in scikit-learn's data set.
        by_label: for each label, the positions of its digits in ``images``.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    by_label: tuple[NDArray[np.int64], ...]


def _subset(images: NDArray[np.float32], labels: NDArray[np.int64], indices: NDArray[np.int64]) -> Digits:
    chosen = labels[indices]
    by_label = tuple(np.flatnonzero(chosen == label) for label in range(10))
    return Digits(images[indices], chosen, indices, by_label)


@lru_cache(maxsize=1)
def load_split() -> tuple[Digits, Digits]:
    """Split scikit-learn's 1,797 digits into training and held-out digits, class by class, always the same way.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError(
            f"the handwritten digits come with scikit-learn, which is not installed: {pip_install('train')}"
        ) from None
    raw = load_digits()
    images = (raw.images / 16).astype(np.float32)
    labels = raw.target.astype(np.int64)
    # Our own shuffle, not train_test_split: the split must never move with a scikit-learn release.
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    training, held_out = [], []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = round(len(members) * HELD_OUT_FRACTION)
        held_out.append(members[:count])
        training.append(members[count:])
    return (
        _subset(images, labels, np.sort(np.concatenate(training))),
        _subset(images, labels, np.sort(np.concatenate(held_out))),
    )
