"""Who may import whom, from the sources: the folders' order, and that of the sub-packages of one."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    "qwen2vl_trt",
    "export",
    "engines",
    "runtime",
    "planning",
    "tiny",
    "building",
    "accuracy",
    "batch",
    "serving",
    "benchmarks",
    "verify",
    "commands",
)
"""Each imports only those before it, the first being the modules that stand in none of the others; the two scripts
import all of them, and nothing imports a script."""
SCRIPTS = ("build_engines", "run", "qwen2vl_trt.__main__")


def _sources() -> dict[str, Path]:
    """Every module of the project by its full name, but for ``qwen2vl_trt`` itself, which exports names of others."""
    package = os.walk(ROOT / "qwen2vl_trt", followlinks=True)  # export, engines and runtime are links
    files = [Path(folder, name) for folder, _, names in package for name in names if name.endswith(".py")]
    files += [ROOT / f"{script}.py" for script in SCRIPTS if "." not in script]
    modules = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    named = {module.removesuffix(".__init__"): path for path, module in modules.items()}
    del named["qwen2vl_trt"]
    return named


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else parts[0]


SOURCES = _sources()


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of all that a module imports, inside functions and for type checkers too."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield (inner, "") if inner in SOURCES else (source, alias.name)


def of_project(module: str) -> set[str]:
    """The project's modules that a module imports."""
    return {target for target, _ in imports(module) if target in SOURCES}


def test_everything_is_imported_under_one_name():
    """Not as it lies in a checkout: an installed package has no such names, and a module would exist twice."""
    twice = ("export", "engines", "runtime")
    assert not [
        f"{module} imports {found}"
        for module in SOURCES
        for found, _ in imports(module)
        if found.split(".")[0] in twice
    ]


def test_data_flows_one_way_through_the_folders():
    back = []
    for module in SOURCES:
        if module not in SCRIPTS:
            allowed = LAYERS[: LAYERS.index(_layer(module)) + 1]
            back += [f"{module} imports {found}" for found in of_project(module) if _layer(found) not in allowed]
    assert not back


@pytest.mark.parametrize("package", ["qwen2vl_trt.runtime", "qwen2vl_trt.benchmarks"])
def test_a_room_is_built_on_those_that_the_docstring_names_before_it(package):
    """Also through modules that stand in no room."""
    rooms = [path.name for path in SOURCES[package].parent.iterdir() if (path / "__init__.py").is_file()]
    told = re.findall(r"``(\w+)``", ast.get_docstring(ast.parse(SOURCES[package].read_text())) or "")
    order = [name for name in dict.fromkeys(told) if name in rooms]
    assert sorted(order) == sorted(rooms)

    def room_of(module: str) -> str:
        return next((room for room in rooms if module.startswith(f"{package}.{room}.")), "")

    for position, room in enumerate(order):
        reached, ahead = set(), [module for module in SOURCES if room_of(module) == room]
        while ahead:
            for target in of_project(ahead.pop()) - reached:
                if target.startswith(f"{package}."):
                    reached.add(target)
                    if not room_of(target):
                        ahead.append(target)
        later = {target for target in reached if room_of(target) in order[position + 1 :]}
        assert not later, f"{package}.{room} reaches {later}"


def test_no_module_imports_anothers_private_name():
    private = [
        f"{module}: {source}.{name}"
        for module in SOURCES
        for source, name in imports(module)
        if source in SOURCES and name.startswith("_") and not name.startswith("__")
    ]
    assert not private


def test_no_modules_import_each_other_in_a_circle():
    """Not even inside functions: whoever reads one of them would have to read all."""
    waiting = {module: of_project(module) - {module} for module in SOURCES}
    while free := {module for module, targets in waiting.items() if not targets}:
        waiting = {module: targets - free for module, targets in waiting.items() if module not in free}
    assert not waiting


def test_messages_name_commands_that_work_where_the_user_is():
    """``errors.program`` and ``errors.pip_install`` know the checkout from the installed package."""
    fixed = []
    for module, path in SOURCES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = {
            id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node)
        }
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
        for text in texts:
            if re.search(
                r"\brun\.py .|build_engines\.py .|pip install .?qwen2vl-trt", text if isinstance(text, str) else ""
            ):
                fixed.append(f"{module}: {text}")
    assert [found.split(":")[0] for found in fixed] == ["qwen2vl_trt.errors", "qwen2vl_trt.tiny.train"], fixed
