"""Which rows are blamed for lost workers."""

import pytest

from qwen2vl_trt.batch.journal import Journal
from qwen2vl_trt.errors import BatchError


@pytest.fixture
def attempt(tmp_path):
    """One attempt that is lost after the given events; gives the journal that the next one reads."""

    def lose(started=(), finished=()):
        journal = Journal(tmp_path / "partition 0.journal", 1)
        for row in started:
            journal.start(row)
        for row in finished:
            journal.finish(row)
        return journal

    return lose


def test_rows_lost_together_twice_are_taken_alone(attempt):
    attempt("abc", "a")
    after_one = attempt("abcd", "a")
    assert not any(map(after_one.alone, "abcd"))
    after_two = attempt()
    assert [after_two.alone(row) for row in "abcd"] == [False, True, True, False]  # d was in hand once
    assert not any(map(after_two.given_up, "abcd"))


def test_a_row_lost_alone_is_given_up(attempt):
    attempt("ab")
    attempt("ab")
    attempt("a")
    assert not attempt("a").given_up("a")  # once alone, and one retry is allowed
    last = attempt()
    assert last.given_up("a")
    assert not last.given_up("b")
    assert last.losses("a") == 4


def test_a_torn_line_is_passed_over(attempt, tmp_path):
    attempt("a")
    with (tmp_path / "partition 0.journal").open("ab") as file:
        file.write(b'["start", "b')
    attempt("a")
    last = attempt()
    assert [last.losses(row) for row in "ab"] == [2, 0]


def test_lost_with_nothing_in_hand(attempt):
    attempt("a", "a")
    attempt()
    with pytest.raises(BatchError, match="partition 0: its worker was lost 2 times with no row in hand"):
        attempt()
