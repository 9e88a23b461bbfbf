"""The package as it is installed: a wheel in an environment of its own, the checkout on no path."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANSWER = ("--image", ROOT / "docs" / "digits.png", "--prompt", "What digits are in the image?")
ENGINES = ("--model", "tiny", "--backend", "torch", "--precision", "fp32")


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git would give: a build writes into its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    source = folder / "source"
    for name in filter(None, files):
        if (ROOT / name).is_symlink() and (ROOT / name).is_dir():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_one_top_level_name_and_all_its_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"qwen2vl_trt", "qwen2vl_trt-0.1.0.dist-info"}
    for folder in ("export", "engines", "runtime", "qwen2vl_trt"):
        modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")]
        inside = [module if folder == "qwen2vl_trt" else f"qwen2vl_trt/{module}" for module in modules]
        assert set(inside) <= set(names)
    for config in (ROOT / "configs").iterdir():
        assert f"qwen2vl_trt/configs/{config.name}" in names
    for file in (ROOT / "qwen2vl_trt" / "tiny" / "checkpoint").iterdir():
        assert f"qwen2vl_trt/tiny/checkpoint/{file.name}" in names


def test_an_installed_package_answers_about_a_picture(wheel, tmp_path):
    """What it depends on comes from this environment; the package itself does not."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    for number, folder in enumerate(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        # In front of nothing: the wheel's own folder comes first. An editable install's finder is left behind.
        (Path(site) / f"dependencies{number}.pth").write_text(f"import sys; sys.path.append({folder!r})\n")
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", cwd=tmp_path)  # that of a new environment
    run(python, "-m", "pip", "check", cwd=tmp_path)
    user = tmp_path / "user"
    user.mkdir()
    for name in ("runtime.py", "export.py", "engines.py", "tiny.py"):
        (user / name).write_text("raise ImportError('a file of the user')")
    found = run(python, "-c", "import qwen2vl_trt; print(qwen2vl_trt.__file__)", cwd=user)
    assert found.startswith(str(tmp_path / "env"))
    program = python.with_name("qwen2vl-trt")
    assert run(program, *ENGINES, *ANSWER, cwd=user) == "92059\n"
    assert "1,024 patches" in run(program, "inspect", "artifacts/tiny-torch-fp32", cwd=user)
    assert run(python, "-m", "qwen2vl_trt", "--version", cwd=user).startswith("qwen2vl-trt ")
    assert "--max-hw-dims" in run(python.with_name("qwen2vl-trt-build"), "--help", cwd=user)
    library = "from qwen2vl_trt import Pipeline, Request, SamplingParams, Service; print(Pipeline.__module__)"
    assert run(python, "-c", library, cwd=user) == "qwen2vl_trt.runtime.pipeline\n"
