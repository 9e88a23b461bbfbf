"""Model names to folders; the hub is replaced, nothing here needs a network."""

from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from qwen2vl_trt import hub
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.hub import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """Stands for ``snapshot_download``: records its calls, raises ``error`` if set."""

    class FakeHub:
        calls: list[dict] = []  # noqa: RUF012
        error: Exception | None = None

        def __call__(self, repository, **options):
            self.calls.append({"repository": repository} | options)
            if self.error is not None:
                raise self.error
            folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
            folder.mkdir(parents=True, exist_ok=True)
            return str(folder)

    fake = FakeHub()
    fake.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


@pytest.mark.parametrize(
    ("name", "expected", "repository"),
    [
        ("Qwen2.5-VL-3B", "Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen2.5-VL-7B", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen2.5-vl-32b", "Qwen2.5-VL-32B", "Qwen/Qwen2.5-VL-32B-Instruct"),
        ("Qwen2.5-VL-72B", "Qwen2.5-VL-72B", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("someone/Fine.tune-7B", "someone--Fine.tune-7B", "someone/Fine.tune-7B"),
    ],
)
def test_names_and_aliases_are_fetched_from_the_hub(fake_hub, name, expected, repository):
    model = resolve_model(name, revision="main")
    assert model.name == expected
    assert model.folder.is_dir()
    assert model.revision == COMMIT
    (call,) = fake_hub.calls
    assert (call["repository"], call["revision"]) == (repository, "main")
    assert "*.safetensors" in call["allow_patterns"]
    assert not any("bin" in pattern for pattern in call["allow_patterns"])


def test_a_local_folder_asks_no_hub(fake_hub, tmp_path):
    folder = tmp_path / "my model: v2"
    folder.mkdir()
    model = resolve_model(str(folder))
    assert (model.name, model.folder, model.revision) == ("my_model_v2", folder, None)
    assert resolve_model(folder) == model
    assert not fake_hub.calls


def test_local_folder_that_looks_like_a_hub_id(fake_hub, tmp_path, monkeypatch):
    (tmp_path / "out" / "step-100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("out/step-100").name == "step-100"
    assert not fake_hub.calls


def test_names_win_over_folders(fake_hub, tmp_path, monkeypatch):
    (tmp_path / "Qwen2.5-VL-7B").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("Qwen2.5-VL-7B").revision == COMMIT
    assert resolve_model("./Qwen2.5-VL-7B").revision is None


@pytest.mark.parametrize("folder", ["a b/../c", "weird/. .", "x/snapshots/abc", "models--Org--Name/snapshots/abc", "é"])
def test_name_is_safe_in_a_path(tmp_path, folder):
    path = tmp_path / folder
    path.mkdir(parents=True)
    name = resolve_model(path).name
    assert name
    assert Path(name).name == name
    assert name not in (".", "..")
    assert not any(character in name for character in " /:\\")


def test_folder_of_the_hub_cache_is_named_after_its_model(tmp_path):
    path = tmp_path / "models--Org--Name" / "snapshots" / COMMIT
    path.mkdir(parents=True)
    assert resolve_model(path).name == "Org--Name"


def test_tiny_lies_beside_the_package(monkeypatch, tmp_path):
    package = tmp_path / "qwen2vl_trt"
    monkeypatch.setattr(hub, "__file__", str(package / "hub.py"))
    with pytest.raises(CheckpointError, match="tiny model is not installed"):
        resolve_model("tiny")
    folder = tmp_path / "tiny" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_model("tiny") == hub.ResolvedModel("tiny", folder, None)
    with pytest.raises(CheckpointError, match="no revision 'main'"):
        resolve_model("tiny", revision="main")


@pytest.mark.parametrize("name", ["gpt2", "Qwen2.5-VL-8B", "", "a b"])
def test_unknown_model_lists_the_known(fake_hub, name):
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    for known in ("tiny", "Qwen2.5-VL-3B", "Qwen2.5-VL-72B", "Org/Name", "folder"):
        assert known in str(caught.value)
    assert not fake_hub.calls


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", Path("a/b")])
def test_missing_folder_is_not_taken_for_a_hub_id(fake_hub, name):
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(name)
    assert not fake_hub.calls


def http_error(kind):
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("first line\n\nsecond line", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalEntryNotFoundError("no cache"), ["cannot be reached", "local cache"]),
        (errors.OfflineModeIsEnabled("offline"), ["cannot be reached"]),
        (ConnectionError("refused"), ["cannot be reached"]),
        (http_error(errors.GatedRepoError), ["gated", "hf auth login"]),
        (http_error(errors.RepositoryNotFoundError), ["not on the Hugging Face hub"]),
        (http_error(errors.RevisionNotFoundError), ["no revision 'v9'"]),
        (errors.HFValidationError("bad"), ["no valid name"]),
        (http_error(errors.HfHubHTTPError), ["could not be fetched", "first line second line"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
    ],
)
def test_hub_errors_say_what_is_missing_and_the_way_out(fake_hub, error, words):
    fake_hub.error = error
    with pytest.raises(CheckpointError) as caught:
        resolve_model("Qwen2.5-VL-7B", revision="v9")
    message = str(caught.value)
    assert "\n" not in message
    for word in ["Qwen/Qwen2.5-VL-7B-Instruct", "--model", "folder", *words]:
        assert word in message
