"""Prompts begin alike if tokens, pixels and positions do."""

import numpy as np
import pytest

from qwen2vl_trt.runtime.scheduling.sequence import NO_KEYS, common_prefix, token_keys

IMAGE, VIDEO = 90, 91
ONE, TWO = b"1" * 16, b"2" * 16


def keys(ids, *media):
    return token_keys(ids, np.arange(len(ids)) + np.array([[0], [10], [20]]), media)


def test_each_image_has_its_own_tokens():
    found = keys([5, IMAGE, IMAGE, IMAGE, 6, VIDEO, 7], (IMAGE, [ONE, TWO], [1, 2]), (VIDEO, [TWO], [1]))
    assert found.shape == (7, 6)
    assert found[:, 0].tolist() == [5, IMAGE, IMAGE, IMAGE, 6, VIDEO, 7]
    contents = [row.tobytes() for row in found[:, 1:3]]
    assert contents == [bytes(16), ONE, TWO, TWO, bytes(16), TWO, bytes(16)]
    assert found[2, 3:].tolist() == [2, 12, 22]


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
def test_the_first_difference_ends_the_prefix(length):
    ids = list(range(length))
    assert common_prefix(keys(ids), keys(ids)) == length
    assert common_prefix(keys(ids), keys([*ids, 1])) == length
    for place in {0, length // 2, length - 1}:
        for column in range(6):
            other = keys(ids)
            other[place, column] += 1
            assert common_prefix(keys(ids), other) == place
    assert common_prefix(keys(ids), NO_KEYS) == 0
