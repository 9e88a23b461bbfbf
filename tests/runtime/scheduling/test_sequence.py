"""The names of a prompt's blocks: equal names are equal tokens, media and positions from the beginning."""

import numpy as np
import pytest

from qwen2vl_trt.runtime.scheduling.sequence import block_hashes, token_keys

IMAGE, VIDEO = 7, 8
ONE, TWO = b"a" * 16, b"b" * 16


def keys(ids, media=()):
    return token_keys(ids, np.arange(len(ids)) + np.array([[0], [10], [20]]), media)


def test_keys_name_the_media_of_a_token():
    found = keys([1, IMAGE, IMAGE, 2, IMAGE, VIDEO], [(IMAGE, [ONE, TWO], [2, 1]), (VIDEO, [ONE], [1])])
    assert found.shape == (6, 6)
    assert found[:, 0].tolist() == [1, IMAGE, IMAGE, 2, IMAGE, VIDEO]
    one, two = (np.frombuffer(key, np.int64).tolist() for key in (ONE, TWO))
    assert found[:, 1:3].tolist() == [[0, 0], one, one, [0, 0], two, one]
    assert found[:, 3:].tolist() == [[n, 10 + n, 20 + n] for n in range(6)]


@pytest.mark.parametrize("length", [0, 15, 16, 17, 64, 70])
def test_only_whole_blocks_have_a_name(length):
    assert len(block_hashes(keys(range(length)), 16)) == length // 16


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("place", [0, 15, 16, 40, 47])
def test_whatever_differs_changes_its_block_and_all_after_it(column, place):
    one = keys(range(48))
    other = one.copy()
    other[place, column] += 1
    same = [a == b for a, b in zip(block_hashes(one, 16), block_hashes(other, 16))]
    assert same == [block < place // 16 for block in range(3)]


def test_known_names_are_taken_over():
    whole = keys(range(100))
    known = block_hashes(whole[:50], 16)
    assert block_hashes(whole, 16, known) == block_hashes(whole, 16)
    assert block_hashes(whole[:20], 16, known) == known[:1]


def test_equal_placeholders_of_other_pictures_have_other_names():
    ids = [1] * 4 + [IMAGE] * 30
    one, two = (block_hashes(keys(ids, [(IMAGE, [content], [30])]), 16) for content in (ONE, TWO))
    assert not set(one) & set(two)
