"""``run.py features`` in processes of its own that start at once: forked from one that has imported everything."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None


def start(arguments, log: Path):
    """Start the command; its stderr goes to a file."""
    CONTEXT.set_forkserver_preload(
        [
            "qwen2vl_trt.runtime.features.extraction",
            "qwen2vl_trt.runtime.features.store",
            "qwen2vl_trt.runtime.backends.torch_runner",
            "rich.progress",
        ]
    )
    process = CONTEXT.Process(target=_main, args=([str(argument) for argument in arguments], str(log)))
    process.start()
    return process


def _main(arguments, log):
    import torch

    import run
    from qwen2vl_trt.commands.process import run_command

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["run.py", "features", *arguments]
    try:
        run_command(run.main)
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(f"{log}.peak").write_text(str(peak))  # kilobytes on Linux
