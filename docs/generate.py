"""Writes docs/reference/commands.md and python.md from the code: ``make docs``; tests/test_docs.py compares them."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path

import qwen2vl_trt
from qwen2vl_trt.commands import COMMANDS

FOLDER = Path(__file__).resolve().parent / "reference"
_TITLES = {"options": "of this command", "positional arguments": "what it is given"}
_NOTE = "<!-- Written by docs/generate.py; change the code and run `make docs`. -->"


def commands_page() -> str:
    """Every command and every option, from the parsers."""
    lines = [
        "# Commands",
        "",
        _NOTE,
        "",
        "`qwen2vl-trt COMMAND` of an installed package is `python run.py COMMAND` in a checkout, and"
        " `qwen2vl-trt-build` is `python build_engines.py`. [Exit codes](../../README.md#exit-codes).",
        "",
        "| command | what it does |",
        "| --- | --- |",
    ]
    lines += [f"| [{name}](#{_anchor(name)}) | {what} |" for name, what in COMMANDS.items()]
    lines += ["| [build](#build) | build engines ahead of time (`qwen2vl-trt-build`) |"]
    shared: dict[tuple[str, ...], str] = {}
    for name in [*COMMANDS, "build"]:
        lines += ["", f"## {name}", "", *_command(name, shared)]
    return "\n".join(lines) + "\n"


def _command(name: str, shared: dict[tuple[str, ...], str]) -> Iterator[str]:
    """``shared``: groups of options so far, each with the command that has it first."""
    module = import_module(f"qwen2vl_trt.commands.{name.replace(' ', '_')}")
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    yield inspect.cleandoc(module.__doc__ or "")
    for group in parser._action_groups:
        rows = [f"| {_spelling(a)} | {_help(parser, a)} |" for a in group._group_actions if a.help != argparse.SUPPRESS]
        title = _TITLES.get(group.title or "", group.title)
        if not rows:
            continue
        first = shared.setdefault(tuple(rows), name)
        if first == name:
            yield from ("", f"| {title} | |", "| --- | --- |", *rows)
        else:
            yield from ("", f"Options of {title}: as of [{first}](#{_anchor(first)}).")
    if epilog := getattr(module, "EPILOG", None):
        prog = "qwen2vl-trt-build" if name == "build" else f"qwen2vl-trt {name}"
        yield from ("", "```", (epilog % {"prog": prog}).strip(), "```")


def _spelling(action: argparse.Action) -> str:
    """As it is typed, with what it takes."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else (action.dest or "").upper())
    value = " ".join(value) if isinstance(value, tuple) else value
    if not action.option_strings:
        return f"`{value}`".replace("|", r"\|") if action.metavar or action.choices else f"`{action.dest}`"
    spelling = ", ".join(action.option_strings)
    if action.nargs != 0:
        spelling += f" {value}" + (" ..." if action.nargs in ("+", "*") else "")
    return f"`{spelling}`".replace("|", r"\|") + (" (needed)" if action.required else "")


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    return formatter._expand_help(action).replace("|", r"\|").replace("<", "&lt;") if action.help else ""


def python_page() -> str:
    """All that ``qwen2vl_trt`` exports, with signatures."""
    names = [name for name in qwen2vl_trt.__all__ if not _is_error(getattr(qwen2vl_trt, name))]
    errors = [name for name in qwen2vl_trt.__all__ if name not in names]
    lines = ["# Python", "", _NOTE, "", "`from qwen2vl_trt import ...`:", ""]
    lines += [f"- [{name}](#{_anchor(name)}): {_summary(getattr(qwen2vl_trt, name))}" for name in names]
    lines += ["- the [errors](#errors)"]
    for name in names:
        lines += ["", f"## {name}", "", *_class(getattr(qwen2vl_trt, name))]
    lines += ["", "## Errors", "", "| error | of | |", "| --- | --- | --- |"]
    for name in errors:
        error = getattr(qwen2vl_trt, name)
        lines.append(f"| `{name}` | `{error.__base__.__name__}` | {_summary(error)} |")
    return "\n".join(lines) + "\n"


def _class(found: type) -> Iterator[str]:
    yield from ("```python", f"{found.__name__}{_signature(found)}", "```", "", *_docstring(found))
    for name, member in vars(found).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (property, cached_property)):
            yield from ("", f"### `{found.__name__}.{name}`", "", *_docstring(member))
        elif isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member):
            yield from ("", f"### `{found.__name__}.{name}`", "", "```python")
            yield from (f"{name}{_signature(getattr(found, name))}", "```", "", *_docstring(member))


def _signature(found: object) -> str:
    """Of a class or a function, a parameter a line where one line would be long."""
    signature = inspect.signature(found)  # type: ignore[arg-type]
    parameters = [str(_short(p)).replace("'", "") for name, p in signature.parameters.items() if name != "self"]
    returned = signature.return_annotation
    end = "" if inspect.isclass(found) or returned is signature.empty else f" -> {returned}".replace("'", "")
    line = f"({', '.join(parameters)}){end}"
    return line if len(line) <= 80 else "(\n" + "".join(f"    {one},\n" for one in parameters) + f"){end}"


def _short(parameter: inspect.Parameter) -> inspect.Parameter:
    """With a default that reads alike on every machine: functions and options by their name."""
    if parameter.default is parameter.empty or isinstance(parameter.default, (int, float, str, tuple, type(None))):
        return parameter
    return parameter.replace(default=_Named(getattr(parameter.default, "__name__", type(parameter.default).__name__)))


class _Named(str):
    def __repr__(self) -> str:
        return str(self)


def _summary(found: object) -> str:
    return _markdown(inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ")


def _docstring(found: object) -> Iterator[str]:
    """As Markdown: what is indented below ``Args:`` and the like becomes a list."""
    section = False
    for line in _markdown(inspect.getdoc(found) or "").splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            section = True
            yield from (f"*{line[:-1]}*", "")
        elif section and re.match(r"    \S", line):
            yield "- " + re.sub(r"^([\w., *]+): ", r"`\1`: ", line.strip())
        elif section and line.startswith("    "):
            yield "  " + line.strip()
        else:
            yield line


def _markdown(text: str) -> str:
    """Sphinx's roles and double backquotes as Markdown's."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def _is_error(found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, Exception)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


PAGES = {"commands.md": commands_page, "python.md": python_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
