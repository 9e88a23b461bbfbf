"""Model names to folders; the hub is replaced, nothing here needs a network."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qwen2vl_trt import hub
from qwen2vl_trt.errors import CheckpointError
from qwen2vl_trt.hub import resolve_model
from tests.support.models import MINIMAL_CONFIG

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """Stands for the hub: records the calls of ``snapshot_download``, raises ``error`` if set, fetches ``files``."""

    class FakeHub:
        calls: list[dict] = []  # noqa: RUF012
        error: Exception | None = None
        files: dict[str, str] = {}  # noqa: RUF012

        def __call__(self, repository, **options):
            self.calls.append({"repository": repository} | options)
            if self.error is not None:
                raise self.error
            folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in self.files.items():
                if any(fnmatch(name, pattern) for pattern in options["allow_patterns"]):
                    (folder / name).write_text(text)
            return str(folder)

    fake = FakeHub()
    fake.calls = []
    fake.files = {"config.json": json.dumps(MINIMAL_CONFIG), "model.safetensors": "weights", "model.bin": "weights"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository, revision: list(fake.files))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return fake


def write_config(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MINIMAL_CONFIG | changes))
    return folder


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
    assert {(call["repository"], call["revision"]) for call in fake_hub.calls} == {(repository, "main")}
    assert {path.name for path in model.folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": '{"model_type": "qwen3_vl"}'}, "is Qwen3-VL"),
        ({"config.json": '{"model_type": "gpt2"}'}, "'gpt2'"),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, "holds an adapter (LORA"),
        ({"model-q4.gguf": ""}, "Org/Name holds GGUF, llama.cpp's format (model-q4.gguf)"),
        ({"pytorch_model.bin": ""}, "Org/Name is no checkpoint: it has no config.json on the hub"),
        (
            {"config.json": json.dumps(MINIMAL_CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 3}})},
            "quantization_config.bits is 3; 4, 8 can be read",
        ),
    ],
    ids=["family", "unknown", "adapter", "gguf", "pickle", "quantised"],
)
def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(fake_hub, files, words):
    fake_hub.files = files | {"model.safetensors": "gigabytes"}
    with pytest.raises(CheckpointError, match=re.escape(words)):
        resolve_model("Org/Name")
    (call,) = fake_hub.calls
    assert not any(fnmatch("model.safetensors", pattern) for pattern in call["allow_patterns"])


@pytest.mark.parametrize("left", ["blobs/0123abcd.incomplete", f"snapshots/{COMMIT}/config.json"])
def test_what_is_left_of_a_download_without_a_network(fake_hub, tmp_path, left):
    file = tmp_path / "hub" / "models--Org--Name" / left
    file.parent.mkdir(parents=True)
    file.touch()
    for fake_hub.error in (
        errors.LocalEntryNotFoundError("no cache"),
        httpx.ConnectError("[Errno -2] Name or service not known"),
    ):
        with pytest.raises(CheckpointError, match="is an incomplete download in the local cache, and the Hugging Face"):
            resolve_model("Org/Name")


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


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-7B-Instruct", "tiny"])
def test_a_checkpoint_folder_wins_over_a_known_name(fake_hub, tmp_path, monkeypatch, caplog, name):
    write_config(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    model = resolve_model(name)
    assert (model.folder, model.revision) == (Path(name), None)
    assert f"--model {name} is taken to be the folder {name} here" in caplog.text
    with pytest.raises(CheckpointError, match=f"is the folder {name} and has no revision 'main'"):
        resolve_model(name, revision="main")
    assert not fake_hub.calls


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "tiny"])
def test_another_folder_does_not_stand_in_the_way_of_a_known_name(fake_hub, tmp_path, monkeypatch, caplog, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name).folder != Path(name)
    assert resolve_model(f"./{name}").folder == Path(name)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "words"), [("q4.gguf", "GGUF, llama.cpp's format"), ("model.safetensors", "is a file; a checkpoint is")]
)
def test_a_file_is_named_for_what_it_is(fake_hub, tmp_path, name, words):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=words):
        resolve_model(str(tmp_path / name))


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


def test_tiny_lies_in_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
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
