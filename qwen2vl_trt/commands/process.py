"""How the commands end: what goes wrong is one line on stderr and an exit code.

Nothing slow is imported here, so that Ctrl-C during the seconds that PyTorch takes to import ends as it does later.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from qwen2vl_trt.engines.interrupts import CommandInterrupt
from qwen2vl_trt.errors import Qwen2VLError, pip_install, reason

FAILED = 1
USAGE = 2


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's main function and exit.

    Exit codes: 0 done; 1 the output cannot be written, or the memory is used up; 2 a
    :class:`~qwen2vl_trt.errors.Qwen2VLError` or a package that is not installed, named in one line; 130 interrupted;
    143 terminated, which goes the same way: what Ctrl-C saves and clears away, so does the end of a container or of a
    job's time. Both are a KeyboardInterrupt in ``main``, whose message, if it has one, says what was saved.
    """
    if sys.stderr is None:  # closed (`2>&-`); else errors would be printed on stdout
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:  # closed (`>&-`): whoever writes an answer is to fail, which print() does not
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("qwen2vl_trt.building").setLevel(logging.INFO)  # it says what it chose
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without UTF-8 shows a question mark
    atexit.register(gc.freeze)  # the interpreter's last collection takes half a second over PyTorch's modules
    with CommandInterrupt() as interrupt:
        code: str | int | None = 0
        try:
            try:
                main()
            except SystemExit as end:  # of --help for one
                code = end.code
            if interrupt.seen:
                interrupt.exit()  # something on the way dropped it
            sys.stdout.flush()  # here, where a failure is still caught
        except KeyboardInterrupt as ended:
            interrupt.exit(str(ended))
        except Exception as error:
            if interrupt.seen:
                interrupt.exit()
            _report(error)
    sys.exit(code)


def _report(error: Exception) -> NoReturn:
    if isinstance(error, Qwen2VLError):
        _fail(str(error))
    if isinstance(error, ModuleNotFoundError):
        _fail(f"the package {error.name} is not installed; `{pip_install()}` brings what is needed")
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone (`| head`), which is no news to the user
        _discard_output()
        sys.exit(FAILED)
    if isinstance(error, MemoryError):
        _fail(f"out of memory{f': {error}' if str(error) else ''}", FAILED)
    if isinstance(error, OSError):
        _discard_output()
        _fail(f"{error.filename or 'stdout'}: {reason(error)}", FAILED)
    raise error


def _fail(message: str, code: int = USAGE) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _discard_output() -> None:
    """Point stdout nowhere: the interpreter flushes it at exit, and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
