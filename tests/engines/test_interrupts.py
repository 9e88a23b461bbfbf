"""Ctrl-C and SIGTERM, kept for a while or not, in processes of their own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_trt.engines.interrupts import deferred_interrupt

ROOT = Path(__file__).resolve().parents[2]
TERM, INT = signal.SIGTERM, signal.SIGINT


def ended(main, ignore_ctrl_c=False):
    """Exit code, stdout and stderr of a command whose main function has these lines."""
    lines = "\n    ".join(["import os, signal, sys", "me = os.getpid()", *main])
    code = f"from qwen2vl_trt.commands.process import run_command\ndef main():\n    {lines}\nrun_command(main)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(INT, signal.SIG_IGN if ignore_ctrl_c else signal.SIG_DFL),
    )
    return process.returncode, process.stdout, process.stderr


DEFERRED = (
    "from qwen2vl_trt.engines.interrupts import deferred_interrupt",
    "with deferred_interrupt() as told:",
    "    os.kill(me, {0})",
    "    print('saved', told.is_set())",
    "print('not reached')",
)


@pytest.mark.parametrize(("number", "code", "word"), [(INT, 130, "interrupted"), (TERM, 143, "terminated")])
def test_a_command_ends_with_a_word_and_a_code(number, code, word):
    assert ended([f"os.kill(me, {number})", "print('not reached')"]) == (code, "", f"{word}\n")
    assert ended(line.format(number) for line in DEFERRED) == (code, "saved True\n", f"{word}\n")
    told = ["try:", f"    os.kill(me, {number})", "except KeyboardInterrupt:", "    raise KeyboardInterrupt('3 saved')"]
    assert ended(told) == (code, "", f"{word}: 3 saved\n")
    swallowed = ["try:", f"    os.kill(me, {number})", "except KeyboardInterrupt:", "    raise ImportError('circular')"]
    assert ended(swallowed) == (code, "", f"{word}\n")
    twice = ["try:", f"    os.kill(me, {number})", "finally:", f"    os.kill(me, {INT})"]
    assert ended(twice) == (code, "", f"{word}\n")
    at_exit = ["import atexit", f"atexit.register(os.kill, me, {number})", f"os.kill(me, {number})"]
    assert ended(at_exit) == (code, "", f"{word}\n")


def test_a_background_job_ignores_ctrl_c_and_not_sigterm():
    """As a shell's script starts it with ``&``."""
    for main in (["os.kill(me, {0})"], DEFERRED):
        printed = [("", ""), ("saved True\n", "saved False\nnot reached\n")][main is DEFERRED]
        assert ended((line.format(TERM) for line in main), True) == (143, printed[0], "terminated\n")
        assert ended((line.format(INT) for line in main), True) == (0, printed[1], "")


def test_the_second_one_acts_at_once():
    main = [*DEFERRED[:3], "    os.kill(me, {0})", "    print('not reached')"]
    assert ended(line.format(TERM) for line in main) == (143, "", "terminated\n")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (INT, TERM)]

    def fails():
        with deferred_interrupt():
            signal.raise_signal(INT)
            raise ValueError("in whose place it comes")

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert [signal.getsignal(number) for number in (INT, TERM)] == before
