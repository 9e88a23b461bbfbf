"""Files that a benchmark leaves: refused before minutes of measuring, then written or named in the error."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen2vl_trt.errors import BenchmarkError, MissingDependencyError
from qwen2vl_trt.files import atomic_file, atomic_write


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        BenchmarkError: no such folder, or a folder itself.
    """
    if path.is_dir():
        raise BenchmarkError(f"{path} is a folder; give a file")
    if not path.absolute().parent.is_dir():
        raise BenchmarkError(f"{path}: there is no folder {path.parent}")


def check_plot(path: Path, option: str = "--plot") -> None:
    """Refuse a picture that cannot be drawn or written.

    Args:
        path: of the picture.
        option: that asks for it.

    Raises:
        BenchmarkError: as :func:`check_target`, or its suffix is no picture's.
        MissingDependencyError: Matplotlib is not installed; it names the extra.
    """
    check_target(path)
    if find_spec("matplotlib") is None:
        raise MissingDependencyError(
            f"{option} needs matplotlib, which is not installed: pip install 'qwen2vl-trt[bench]'"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise BenchmarkError(
            f"{path} is no name of a picture; let it end in .png, or one of {', '.join(sorted(kinds))}"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all.

    Raises:
        BenchmarkError: the disk is full, or the file cannot be written.
    """
    try:
        atomic_write(path, json.dumps(content, indent=1).encode())
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror or error}") from None


def write_plot(path: Path, figure: Any) -> None:
    """Write a Matplotlib figure whole or not at all.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror or error}") from None
