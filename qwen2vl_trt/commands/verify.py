"""What holds on this machine: builds the tiny model on every backend, checks, measures, writes a report to send."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from qwen2vl_trt.errors import FileError, reason
from qwen2vl_trt.files import check_target, write_json, write_result

from .options import folder_name
from .process import FAILED

EPILOG = """Exit codes: 0 every check passed, was measured or was skipped; 1 one failed, its row says why; 2 for bad
input; 130 for Ctrl-C, which writes what there is. docs/guide/verify.md says what is checked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`run` reads."""
    parser.add_argument(
        "--minutes", type=_minutes, default=8.0, metavar="N", help="to spend; what does not fit is skipped; default 8"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default a GPU where torch sees one")
    parser.add_argument(
        "--output-dir",
        type=folder_name,
        default=Path(),
        metavar="DIR",
        help="for verify.json and verify.md; default the current folder",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the checks, printing a row of each; exits with code 1 where one failed."""
    folder: Path = arguments.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: {reason(error)}") from None
    page, data = folder / "verify.md", folder / "verify.json"
    for path in (page, data):
        check_target(path)
    import torch
    from filelock import FileLock, Timeout

    from qwen2vl_trt.runtime.backends.runners import parse_device
    from qwen2vl_trt.verify.report import Report, Row, facts, head, summary, table_row
    from qwen2vl_trt.verify.verification import verify

    device = parse_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report(arguments.command_line, arguments.minutes, str(device))

    def show(row: Row) -> None:
        if len(report.rows) == 1:
            print(*facts(report.machine), "", *head(), sep="\n")
        print(table_row(row), flush=True)

    def write() -> None:
        write_json(data, report.as_dict())
        write_result(page, lambda path: path.write_text(report.markdown(), encoding="utf-8"))

    try:
        with FileLock(folder / ".verify.lock", timeout=0):
            write()  # a disk that is full is known now
            try:
                verify(report, show, wants_gpu=arguments.device != "cpu")
            finally:
                write()
    except Timeout:
        raise FileError(f"{folder}: another verify writes there; wait for it, or give another --output-dir") from None
    except OSError as error:
        raise FileError(f"{folder}: {reason(error)}") from None
    print(f"\n{summary(report)} in {report.seconds:.0f} s; {data}, {page}")
    if report.failed:
        sys.stdout.flush()
        sys.exit(FAILED)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
