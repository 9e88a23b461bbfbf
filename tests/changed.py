"""Prints the tests of what has changed since a commit (HEAD), for ``make check``; always tests of layers and pages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("tests/test_layers.py", "tests/test_docs.py")


def changed(base: str) -> list[str]:
    """Files that differ from a commit, and those that git does not know yet."""
    commands = (["diff", "--name-only", "--diff-filter=d", base], ["ls-files", "--others", "--exclude-standard"])
    return [
        name
        for command in commands
        for name in subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    ]


def tests_of(files: Iterable[str]) -> list[str]:
    """The test file of a module's name where there is one, else those of its folder that import it, else them all."""
    found = set(ALWAYS)
    for name in map(Path, files):
        if name.suffix != ".py":
            continue
        if name.parts[0] == "tests":
            found |= {str(name)} if name.name.startswith("test_") and (ROOT / name).exists() else set()
            continue
        parts = name.parts[1:] if name.parts[0] == "qwen2vl_trt" and len(name.parts) > 2 else name.parts
        folder = Path("tests", *parts[:-1])
        there = [] if folder == Path("tests") else sorted((ROOT / folder).glob("test_*.py"))
        module = ".".join((*parts[:-1], name.stem))
        found |= {
            str(path.relative_to(ROOT))
            for path in [path for path in there if path.name == f"test_{name.stem}.py"]
            or [path for path in there if f"{module} import" in path.read_text(encoding="utf-8")]
            or there
        }
    return sorted(found)


if __name__ == "__main__":
    print(*tests_of(changed(sys.argv[1] if len(sys.argv) > 1 else "HEAD")))
