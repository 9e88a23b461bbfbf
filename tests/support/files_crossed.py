"""The files of the product whose functions a piece of work runs: what somebody has to read to follow it."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("export", "engines", "runtime", "qwen2vl_trt")


def files_crossed(work: Callable[[], object]) -> list[str]:
    """Run it and name them, by their path in the checkout. Threads count that start while it runs."""
    crossed = set()

    def note(frame, event, argument):
        if event == "call":
            crossed.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = {os.path.relpath(os.path.realpath(name), ROOT) for name in crossed}
    return sorted(name for name in files if Path(name).parts[0] in _FOLDERS and not name.endswith("__init__.py"))
