"""Adapters as models of a server: each answers as a pipeline does with it, at the same time as the others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from qwen2vl_trt import Pipeline, PipelineOptions, Request, SamplingParams, Service
from qwen2vl_trt.errors import CheckpointError, LimitError
from qwen2vl_trt.hub import resolve_model
from tests.support.adapters import factors, modules, write_adapter
from tests.support.engine_folders import build

starlette = pytest.importorskip("starlette", reason="starlette is not installed")
from starlette.testclient import TestClient  # noqa: E402

from qwen2vl_trt.commands import call  # noqa: E402
from qwen2vl_trt.serving.app import App, ServerSettings  # noqa: E402

NAMES = ("one", "two")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(resolve_model("tiny").folder)
    parent, names = tmp_path_factory.mktemp("adapters"), modules(model, "v_proj")
    return {
        name: write_adapter(parent / name, factors(model, names, seed=seed), target_modules=["v_proj"], lora_alpha=80)
        for seed, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def pipeline(adapters, tmp_path_factory):
    folder = build("tiny", tmp_path_factory.mktemp("served") / "engines", "torch")
    return Pipeline.from_engine_dir(folder, "cpu", PipelineOptions(lora_modules=adapters))


@pytest.fixture(scope="module")
def client(pipeline):
    with Service(pipeline) as service:
        app = App(ServerSettings("tiny", adapters=NAMES, allowed_hosts=["testserver"]))
        app.open(service, pipeline)
        yield TestClient(app)


def test_they_are_listed(client):
    listed = client.get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in listed] == [("tiny", None), ("one", "tiny"), ("two", "tiny")]
    assert client.get("/v1/models/two").json()["id"] == "two"
    assert client.get("/v1/models/three").status_code == 404


def test_each_model_answers_as_itself(client, adapters, pipeline):
    """All at once; the pipeline gives the expected answers, one at a time, from the same adapters opened anew."""
    other = Pipeline.from_engine_dir(pipeline.engines.folder, "cpu", pipeline.options)
    params, question = SamplingParams(max_tokens=12), "How many digits are in the image?"

    def ask(name):
        body = {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 12}
        answer = client.post("/v1/chat/completions", json=body).json()
        text = client.post("/v1/completions", json={"model": name, "prompt": "Read", "max_tokens": 12}).json()
        embedded = client.post("/v1/embeddings", json={"model": name, "input": "Read"}).json()
        assert {answer["model"], text["model"], embedded["model"]} == {name or "tiny"}
        return answer["choices"][0]["message"]["content"], text["choices"][0]["text"], embedded["data"][0]["embedding"]

    names = ["tiny", *NAMES, None, *NAMES]
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(ask, names)))
    assert found[None] == found["tiny"]
    for name, (answer, text, _) in found.items():
        adapter = name if name in NAMES else None
        spoken = other.generate([Request(question, adapter=adapter)], params)[0]
        written = other.generate([Request(other.encode("Read"), adapter=adapter)], params)[0]
        assert (answer, text) == (spoken.text, written.text)
    assert len({text for _, text, _ in found.values()}) == 3
    assert len({tuple(vector) for *_, vector in found.values()}) == 3


def test_another_model_is_named(client):
    refused = client.post("/v1/completions", json={"model": "three", "prompt": "Read"})
    assert refused.status_code == 404
    assert refused.json()["error"]["message"] == "there is no such model; this server has tiny, one, two"


def test_options_of_the_command(adapters, tmp_path, capsys):
    for given, error, said in (
        (f"x={tmp_path}", CheckpointError, r"is no adapter: it has no adapter_config\.json"),
        (f"tiny={adapters['one']}", LimitError, r"--lora-modules tiny=.*: the model has this name"),
    ):
        with pytest.raises(error, match=said):
            call("serve", ["--model", "tiny", "--backend", "torch", "--lora-modules", given])
    with pytest.raises(SystemExit):
        call("serve", ["--model", "tiny", "--lora-modules", "one"])
    assert "'one' is not NAME=DIR" in capsys.readouterr().err
