"""The exceptions a user can meet. Each message names the thing, the limit and the way out, in one line."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent

_LONGEST_WORD = 300
_LONGEST_MESSAGE = 2000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


def shortened(message: str) -> str:
    """A message on one line and of bounded length, whatever names and texts it echoes.

    Line breaks and what else a terminal would act on are escaped. Of a word of more than 300 characters (an image's
    base64 given as its name) and of a message of more than 2,000 the beginning and the end are kept.
    """
    message = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), message)
    message = _LONG_WORD.sub(lambda match: _cut(match[0], _LONGEST_WORD), message)
    return _cut(message, _LONGEST_MESSAGE)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    gap = f"...({len(text):,} characters)..."
    kept = most - len(gap)
    return text[: kept * 2 // 3] + gap + text[-(kept // 3) :]


def reason(error: BaseException) -> str:
    """What an exception says, in one line and without a number of the system's; its type where it says nothing."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def program(name: str) -> str:
    """How ``run.py`` or ``build_engines.py`` is called from here: the script in a checkout, else the command."""
    started = Path(sys.argv[0])
    if started.name in ("run.py", "build_engines.py"):
        return f"python {started.with_name(name)}"
    if Path.cwd().resolve() == _CHECKOUT and (_CHECKOUT / name).is_file():
        return f"python {name}"
    return {"run.py": "qwen2vl-trt", "build_engines.py": "qwen2vl-trt-build"}[name]


def pip_install(extra: str = "") -> str:
    """The command that installs this package with an extra, from its checkout where it lies in one."""
    extras = f"[{extra}]" if extra else ""
    if not (_CHECKOUT / "pyproject.toml").is_file():
        return f"pip install 'qwen2vl-trt{extras}'"
    return f"pip install -e '{'.' if Path.cwd().resolve() == _CHECKOUT else _CHECKOUT}{extras}'"


def require(what: str, extra: str, modules: dict[str, str], hint: str = "") -> None:
    """See that optional packages are installed.

    Args:
        what: needs them.
        extra: of this package, which brings them all.
        modules: what is imported, and what a package index calls it.
        hint: another way out.

    Raises:
        MissingDependencyError: naming all that are missing, and the command that installs them.
    """
    missing = [package for module, package in modules.items() if find_spec(module) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise MissingDependencyError(
            f"{what} needs {' and '.join(missing)}, which {are} not installed: {pip_install(extra)}{hint}"
        )


class Qwen2VLError(Exception):
    """Base of every error this project raises on purpose. The commands print it and exit with code 2.

    Args:
        message: see :func:`shortened`, which it goes through.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class CheckpointError(Qwen2VLError):
    """A checkpoint is missing, incomplete, corrupt, or not a Qwen2.5-VL."""


class MediaError(Qwen2VLError):
    """An image or a video cannot be read or has an unusable size."""


class PromptError(Qwen2VLError):
    """A prompt does not fit its images, its videos or the chat template."""


class LimitError(Qwen2VLError):
    """An input lies outside what the engines were built for."""


class SamplingError(Qwen2VLError):
    """A sampling parameter has no meaning."""


class BuildError(Qwen2VLError):
    """An engine cannot be built."""


class EngineError(Qwen2VLError):
    """An engine cannot be loaded: corrupt, incomplete, or of another version."""


class ExecutionError(Qwen2VLError):
    """An engine failed while it ran, for want of memory for one."""


class DeadlineError(Qwen2VLError):
    """A request's deadline passed before its first token, or is no number of seconds."""


class UnavailableError(Qwen2VLError):
    """A service takes no more requests: it is full, closed, or has failed."""


class FeaturesError(Qwen2VLError):
    """Features cannot be written to their file."""


class CompareError(Qwen2VLError):
    """Two models cannot be compared, or a comparison cannot be written."""


class BenchmarkError(Qwen2VLError):
    """A benchmark cannot be run as asked."""


class MissingDependencyError(Qwen2VLError):
    """An optional package is not installed; the message names the extra that brings it."""


class PlanError(Qwen2VLError):
    """A deployment cannot be planned as asked."""


class BatchError(Qwen2VLError):
    """A batch job cannot be run as asked, or cannot go on."""


class FileError(Qwen2VLError):
    """A file that a user named cannot be written."""
