"""What the pages say that can be checked: links lead somewhere, options exist, the reference is what the code says."""

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from qwen2vl_trt.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@cache
def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def without_code(page):
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


@cache
def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", without_code(page))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    lost = []
    text = without_code(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_exist(page):
    """Of the commands in blocks of code."""
    known = known_options()
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    wrong = []
    for line in re.findall(r"(?m)^(?:\$ | {4}).*?((?:run\.py|build_engines\.py|qwen2vl-trt(?:-build)?) .*)$", text):
        program, *words = shlex.split(line, comments=True)
        command = "build" if "build" in program else "generate"
        if words and words[0] in COMMANDS:
            command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        wrong += [f"{command} {word}" for word in words if word.startswith("--") and word not in known[command]]
    assert not wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "python.md"])
def test_python_parses_and_imports_what_there_is(page):
    import qwen2vl_trt

    for block in re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "qwen2vl_trt":
                assert {alias.name for alias in node.names} <= set(qwen2vl_trt.__all__)


@cache
def known_options():
    """The options of each command, from the page that lists them."""
    sections = re.split(r"(?m)^## ", generator().commands_page())[1:]
    own = {section.splitlines()[0]: set(re.findall(r"^\| `(--[\w-]+)", section, re.M)) for section in sections}
    for section in sections:
        for other in re.findall(r"as of \[([\w ]+)\]", section):
            own[section.splitlines()[0]] |= own[other]
    return own


@pytest.mark.parametrize("name", ["commands.md", "python.md"])
def test_the_reference_is_what_the_code_says(name):
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == generator().PAGES[name](), "run `make docs`"


def test_the_reference_has_every_command_and_class():
    import qwen2vl_trt

    commands, python = generator().commands_page(), generator().python_page()
    assert not [name for name in [*COMMANDS, "build"] if f"\n## {name}\n" not in commands]
    assert not [
        name for name in qwen2vl_trt.__all__ if f"\n## {name}\n" not in python and f"| `{name}` |" not in python
    ]


def test_what_has_not_run_is_said_in_one_place():
    """In README; another page would go on saying it when README no longer does."""
    said = re.compile(r"(has|have|had) (not )?(yet )?run on (a|any|no) GPU|[Nn]othing [^.|]*run on a GPU|no GPU figure")
    saying = {name for page, name in zip(PAGES, NAMES) if said.search(page.read_text(encoding="utf-8"))}
    assert saying - {"CHANGELOG.md"} == {"README.md"}


def test_the_container_copies_what_there_is():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied
    assert not [path for path in copied if not path.startswith("--") and not (ROOT / path).exists()]


def test_a_change_is_checked_by_the_tests_beside_it():
    """``make check``."""
    from tests.changed import ALWAYS, tests_of

    def found(*files):
        return [name for name in tests_of(files) if name not in ALWAYS]

    assert found("runtime/sampler.py") == ["tests/runtime/test_sampler.py"]
    assert found("qwen2vl_trt/mrope.py", "README.md") == ["tests/qwen2vl_trt/test_mrope.py"]
    assert "tests/engines/test_tensorrt_profiles.py" in found("engines/tensorrt_profiles.py")
    assert found("qwen2vl_trt/planning/__init__.py") == [
        str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/planning").glob("test_*.py"))
    ]
    assert found("tests/export/test_graphs.py", "tests/gone/test_gone.py") == ["tests/export/test_graphs.py"]
