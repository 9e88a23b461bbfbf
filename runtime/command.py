"""How both commands end: what goes wrong is one line on stderr and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from qwen2vl_trt.errors import Qwen2VLError

USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function and exit.

    Exit codes: 0 done; 2 a :class:`~qwen2vl_trt.errors.Qwen2VLError`, named in one line; 130 interrupted.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        main()
    except Qwen2VLError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def fail(error: Exception) -> int:
    """Report an error in one line; returns the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return USAGE
