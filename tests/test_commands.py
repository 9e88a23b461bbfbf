"""Both commands as a user meets them: exit codes, what goes to stdout, one line on stderr when something is wrong.

A process of its own takes seconds to start, so most cases run ``main`` here, through the same ``run_command``.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import build_engines
import run
from qwen2vl_trt import __version__
from qwen2vl_trt.commands import COMMANDS, make_parser
from qwen2vl_trt.commands.process import run_command
from qwen2vl_trt.engines.manifest import FORMAT
from tests.support import fake_nvimgcodec
from tests.support.engine_folders import BUILDS, write_checkpoint
from tests.support.media_files import save_video

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ["--min-hw-dims", "4", "--max-hw-dims", "180", "--max-batch-size", "2"]
LIMITS = [*IMAGES, "--max-num-seqs", "3", "--max-input-len", "200", "--max-seq-len", "400"]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user's folder: a checkpoint, images, a video, and what a user gets wrong; engines are built at first use."""
    folder = tmp_path_factory.mktemp("user")
    write_checkpoint(folder / "model")
    rng = np.random.default_rng(0)
    for name, height, width in (("a.png", 112, 140), ("b.jpg", 130, 90), ("wide.png", 10, 2500), ("big.png", 700, 500)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    save_video(folder / "v.mp4", [np.full((64, 96, 3), 10 * number, np.uint8) for number in range(25)])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    (folder / "bomb.png").write_bytes(_png_header(60_000, 60_000))
    (folder / "nothing").mkdir()
    (folder / "limits.yaml").write_text("model: model\nmax_batch_size: 0\n")
    (folder / "list.yaml").write_text("- model\n")
    return folder


def _png_header(width, height):
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.fixture
def call(user, monkeypatch, capfd):
    """Run a command in the user's folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(user)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(script.main)
        found = capfd.readouterr()
        return ended.value.code or 0, found.out, found.err

    return call


@pytest.fixture(params=[backend for backend, _ in BUILDS])
def engines(request, call):
    """Options that run engines built for each backend."""
    folder = Path(f"artifacts/model-{request.param}-fp32")
    if not folder.exists():
        built = call(
            build_engines, "--model", "model", "--backend", request.param, "--precision", "fp32", *LIMITS
        )  # fmt: skip
        assert built == (0, "", f"{folder}: built\n")
    return ("--engine-dir", folder)


@pytest.fixture
def quick(call):
    """Options that run engines of the backend that is quickest to build."""
    folder = Path("artifacts/model-torch-fp32")
    if not folder.exists():
        call(build_engines, "--model", "model", "--backend", "torch", "--precision", "fp32", *LIMITS)
    return ("--engine-dir", folder)


def test_an_answer_is_the_same_in_every_form(call, engines, user):
    question = ("--prompt", "What digits are in the images?", "--image", "a.png", "--image", "b.jpg")
    code, answer, errors = call(run, *engines, *question, "--max-tokens", 12)
    assert (code, errors) == (0, "")
    assert answer.endswith("\n")
    assert call(run, *engines, *question, "--max-tokens", 12, "--stream") == (0, answer, "")
    assert call(run, "generate", *engines, *question, "--max-tokens", 12) == (0, answer, "")
    code, out, errors = call(run, *engines, *question, "--max-tokens", 12, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(out)
    media = {"images", "videos"}
    assert set(found) == {"answer", "tool_calls", "token_ids", "finish_reason", "logprobs", "timings"} | media
    assert (found["logprobs"], found["tool_calls"]) == (None, [])
    assert found["answer"] + "\n" == answer
    assert found["finish_reason"] == "length"
    assert len(found["token_ids"]) == 12
    assert found["timings"]["total"] > 0

    sampling = "--max-tokens 12 --temperature 0.9 --top-p 0.95 --top-k 50 --repetition-penalty 1.2 --seed 7".split()  # noqa: SIM905
    assert call(run, *engines, *question, *sampling) == call(run, *engines, *question, *sampling)
    code, stopped, _ = call(run, *engines, *question, "--max-tokens", 12, "--stop", answer[3:5], "--stop", "never")
    assert stopped == answer[: answer.index(answer[3:5])] + "\n"
    code, _, errors = call(run, *engines, "--prompt", "<video> or <image>", "--image", "a.png", "--video", "v.mp4",
                           "--max-tokens", 3)  # fmt: skip
    assert (code, errors) == (0, "")
    code, _, errors = call(run, *engines, "--prompt", "big", "--image", "big.png", "--max-pixels", 35280)
    assert (code, errors) == (0, "")


def test_the_form_of_an_answer(call, quick, user):
    schema = {"enum": ["seven", "eight"]}
    (user / "schema.json").write_text(json.dumps(schema))
    (user / "grammar.lark").write_text('start: "<" /[0-9]{2}/ ">"')
    question = (*quick, "--prompt", "x", "--max-tokens", 64)
    for options, pattern in (
        (("--json-schema", "schema.json"), '"(seven|eight)"'),
        (("--regex", "[ab]{3}"), "[ab]{3}"),
        (("--choice", "left", "--choice", "right"), "left|right"),
        (("--grammar", "grammar.lark"), "<[0-9]{2}>"),
    ):
        code, out, errors = call(run, *question, *options)
        assert (code, errors) == (0, "")
        assert re.fullmatch(pattern, out[:-1]), options
    code, out, errors = call(run, *question, "--json-object", "--logit-bias", "60=-100", "7=2.5")
    assert (code, errors, out[:1]) == (0, "", "{")


def test_tools_of_a_prompt(call, quick, user):
    function = {"name": "count", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
    (user / "tools.json").write_text(json.dumps([{"type": "function", "function": function}]))
    (user / "called.lark").write_text('start: "<tool_call>{\\"name\\": \\"count\\", \\"arguments\\": {}}</tool_call>"')
    asked = (*quick, "--prompt", "x", "--tools", "tools.json", "--max-tokens", 90)
    assert_one_line(call(run, *asked), "template does not write tools", asked)
    parts = "".join(
        f"{{% if part.type == '{kind}' %}}<|vision_start|><|{kind}_pad|><|vision_end|>{{% endif %}}"
        for kind in ("image", "video")
    )
    (user / "short.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{parts}{{{{ part.text }}}}{{% endfor %}}{{% endif %}}{{% endfor %}}"
    )
    template = ("--chat-template", "short.jinja")
    code, out, errors = call(run, *asked, *template, "--grammar", "called.lark", "--json")
    assert (code, errors) == (0, "")
    found = json.loads(out)
    assert (found["answer"], found["tool_calls"]) == ("", [{"name": "count", "arguments": "{}"}])
    (user / "tools.json").write_text("{")
    assert_one_line(call(run, *asked), "--tools: no JSON", asked)
    (user / "tools.json").write_text('[{"type": "function"}]')
    assert_one_line(call(run, *asked), "tool 1", asked)


def test_single_tokens_of_an_answer(call, quick):
    question = (*quick, "--prompt", "x", "--json")
    code, out, errors = call(run, *question, "--max-tokens", 8, "--logit-bias", "60=100", "--logprobs", 2)
    assert (code, errors) == (0, "")
    found = json.loads(out)
    assert found["token_ids"] == [60] * 8
    assert [each["token_id"] for each in found["logprobs"]] == [60] * 8
    assert all(len(each["top"]) == 2 and each["top"][0][1] >= each["top"][1][1] for each in found["logprobs"])
    code, out, errors = call(run, *question, "--logit-bias", "60=100", "--stop-token-ids", 7, 60)
    assert (code, errors) == (0, "")
    found = json.loads(out)
    assert (found["token_ids"], found["answer"], found["finish_reason"]) == ([60], "", "stop")


def test_sizes_are_named_and_options_of_media_are_followed(call, quick, caplog):
    def ask(*options):
        code, out, errors = call(run, *quick, "--prompt", "x", *options, "--max-tokens", 1, "--json")
        assert (code, errors) == (0, "")
        found = json.loads(out)
        return found["images"], found["videos"]

    (image,), videos = ask("--image", "big.png")
    assert (image["original_size"], image["resized_size"], videos) == ([500, 700], [140, 196], [])
    assert (image["grid_thw"], image["tokens"], image["limited_by"]) == ([1, 14, 10], 35, "max_hw_dims")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("image 1 (big.png) (500x700) is resized to 140x196")
    named, _ = ask("--image", "big.png", "--image", "a.png", "--resized-height", 60, "--resized-width", 84)
    assert [size["resized_size"] for size in named] == [[84, 56]] * 2
    _, (video,) = ask("--video", "v.mp4", "--fps", 4, "--total-pixels", 60000)
    assert (video["original_size"], video["frames"]) == ([96, 64], 10)
    for options, message in (
        (("--fps", 0), "fps is 0.0; it must be a number above 0"),
        (("--fps", 1, "--nframes", 4), "fps 1 and nframes 4 both say"),
        (("--min-frames", 9, "--max-frames", 8), "min_frames 9 is above max_frames 8"),
        (("--resized-height", 56), "resized_height and resized_width go together"),
    ):
        code, out, errors = call(run, *quick, "--prompt", "x", "--video", "v.mp4", *options)
        assert (code, out) == (2, "")
        assert message in errors


def test_features_writes_a_tensor_an_image(call, engines):
    images = ("--image", "a.png", "--image", "b.jpg")
    Path("f.safetensors").unlink(missing_ok=True)
    code, out, errors = call(run, "features", *engines, *images, "--output", "f.safetensors")
    assert (code, out) == (0, "")
    assert errors.startswith("f.safetensors: 2 images, ")
    assert {name: list(tensor.shape) for name, tensor in load_file("f.safetensors").items()} == {
        "a.png": [20, 128],
        "b.jpg": [15, 128],
    }


def test_jpeg_files_are_decoded_on_a_gpu(call, quick, monkeypatch):
    """A fake of nvImageCodec decodes each level one lower, on the CPU."""
    codec = fake_nvimgcodec.install(monkeypatch)
    for module in ("qwen2vl_trt.runtime.inputs.jpeg_decoder", "qwen2vl_trt.runtime.preprocessing.preprocessor"):
        monkeypatch.setattr(f"{module}.check_gpu_decoding", lambda device: None)
    images = ("--image", "a.png", "--image", "b.jpg")
    found = {}
    for decode in ("cpu", "gpu"):
        options = (*quick, *images, "--decode", decode, "--overwrite")
        assert call(run, "features", *options, "--output", "d.safetensors")[0] == 0
        found[decode] = load_file("d.safetensors")
        assert len(codec.calls) == (decode == "gpu")
    assert torch.equal(found["cpu"]["a.png"], found["gpu"]["a.png"])
    assert not torch.equal(found["cpu"]["b.jpg"], found["gpu"]["b.jpg"])
    assert call(run, *quick, *images, *ASK, "--max-tokens", 2, "--decode", "gpu")[0] == 0
    assert len(codec.calls) == 2


def test_eval_prints_a_table_or_json(call, quick, monkeypatch):
    monkeypatch.setattr("qwen2vl_trt.engines.progress.LINE_SECONDS", 1e6)  # no line on stderr on a slow machine either
    code, table, errors = call(run, "eval", *quick, "--cases", 2)
    assert (code, errors) == (0, "")
    assert "two images" in table
    code, out, errors = call(run, "eval", *quick, "--cases", 2, "--json")
    assert (code, errors) == (0, "")
    assert {task: score["cases"] for task, score in json.loads(out).items()} == {
        "read": 2,
        "count": 2,
        "two_images": 2,
        "video": 2,
    }


def test_a_model_is_built_where_engines_are_missing(call, user):
    options = ("--model", "model", "--backend", "torch", "--precision", "bf16", *LIMITS)
    built = user / "artifacts" / "model-torch-bf16" / "manifest.json"
    code, answer, errors = call(run, *options, "--prompt", "Hello", "--max-tokens", 3)
    assert (code, errors) == (0, "")
    first = built.stat().st_mtime_ns
    assert call(run, *options, "--prompt", "Hello", "--max-tokens", 3) == (0, answer, "")
    assert call(build_engines, *options) == (0, "", "artifacts/model-torch-bf16: up to date\n")
    assert built.stat().st_mtime_ns == first
    call(build_engines, *options, "--force")
    assert built.stat().st_mtime_ns > first
    assert call(run, *options, "--engine-dir", "elsewhere", "--prompt", "Hello", "--max-tokens", 3)[0] == 0
    assert (user / "elsewhere" / "manifest.json").is_file()
    (user / "ours.yaml").write_text("model: model\nmax_batch_size: 3\nmax_num_seqs: 5\nmin_hw_dims: 4\n")
    assert call(build_engines, "--config", "ours.yaml", "--backend", "torch", "--engine-dir", "ours")[0] == 0
    profile = json.loads((user / "ours" / "manifest.json").read_text())["profile"]
    assert (profile["max_batch_size"], profile["max_num_seqs"]) == (3, 5)


def test_engines_that_are_there_serve_what_they_can_and_are_replaced_by_force_alone(call, user):
    """The defaults are others than the limits here; a default that nobody gave is no difference."""
    ask = (*ASK, "--max-tokens", 1)
    there = ("--model", "model", "--engine-dir", "kept")
    build = (*there, "--backend", "torch", "--precision", "fp32")
    assert call(build_engines, *build, *LIMITS) == (0, "", "kept: built\n")
    manifest = user / "kept" / "manifest.json"
    before = manifest.stat().st_mtime_ns

    assert call(run, *there, *ask)[0] == 0
    assert call(run, *there, *ask, "--backend", "torch", "--max-batch-size", 2)[0] == 0
    assert call(run, "--engine-dir", "kept", *ask, "--precision", "fp32", "--max-num-seqs", 3)[0] == 0
    code, _, errors = call(build_engines, *there)
    assert (code, errors) == (0, f"kept: up to date, built with {' '.join(LIMITS)}\n")

    for script, *options, message in (
        (run, *there, *ask, "--max-batch-size", 4, "--max-batch-size 2 there, 4 wanted"),
        (run, *there, *ask, "--max-num-seqs", 4, "--max-num-seqs 3 there, 4 wanted"),
        (run, *there, *ask, "--backend", "onnxruntime", "--backend torch there, onnxruntime wanted"),
        (run, *there, *ask, "--precision", "bf16", "--precision fp32 there, bf16 wanted"),
        (run, "--model", "tiny", "--engine-dir", "kept", *ask, "--model model ("),
        (run, "features", *there, "--image", "a.png", "--output", "k", "--max-seq-len", 500, "--max-seq-len 400 there"),
        (run, "bench", "vision", *there, "--max-hw-dims", 181, "--max-hw-dims 180 there, 181 wanted"),
        (build_engines, *there, "--max-batch-size", 4, "Pass --force to replace them, or give another --engine-dir"),
    ):
        assert_one_line(call(script, *options), message, options)
        assert manifest.stat().st_mtime_ns == before, options
    for options in (("--max-batch-size", 4), ("--force",), ("--revision", "main")):
        assert_one_line(call(run, "--engine-dir", "kept", *ask, *options), "runs as it was built", options)

    assert call(run, *build, *ask, "--max-batch-size", 4, "--force")[0] == 0
    profile = json.loads(manifest.read_text())["profile"]
    assert (profile["max_batch_size"], profile["max_seq_len"]) == (4, 8192), "built from scratch"
    assert call(run, *there, *ask)[0] == 0


def test_fp8_quantises_first(call, user):
    pytest.importorskip("modelopt", reason="NVIDIA Model Optimizer is not installed: the quantize extra")
    options = ("--model", "tiny", "--precision", "fp8", "--backend", "torch", "--calibration-size", 12, *LIMITS)
    code, out, errors = call(build_engines, *options)
    built = "artifacts/tiny-torch-fp8: built".replace("/", os.sep)
    assert (code, out, errors.splitlines()[-1]) == (0, "", built)  # after its progress, where that takes over 10 s
    assert Path("artifacts/tiny-fp8/hf_quant_config.json").is_file()
    code, answer, errors = call(run, *options, "--image", "a.png", *ASK)
    assert (code, errors) == (0, ""), "found again, not made again"
    assert answer.strip()
    again = ("--model", Path("artifacts/tiny-fp8"), "--backend", "torch")
    assert call(build_engines, *again, "--precision", "fp8", *LIMITS)[0] == 0
    found = call(build_engines, *again, "--precision", "bf16", *LIMITS)
    assert_one_line(found, "is quantised to FP8 and cannot be built in bf16: --precision fp8", again)
    (user / "broken").mkdir(exist_ok=True)
    (user / "broken" / "cut.png").write_bytes((user / "cut.png").read_bytes())
    found = call(run, *options, "--calibration-data", "broken", "--force", "--image", "a.png", *ASK)
    assert_one_line(found, "calibration data, broken/cut.png: ", "broken")


def test_help_names_models_and_limits(call):
    for script, arguments in ((run, ("generate",)), (run, ("features",)), (run, ("eval",)), (build_engines, ())):
        code, out, errors = call(script, *arguments, "--help")
        assert (code, errors) == (0, "")
        assert "--max-hw-dims" in out
        assert "Qwen2.5-VL-{3B,7B,32B,72B}" in out
    overview = call(run)
    assert all(call(run, word) == overview for word in ("help", "--help"))
    for name in COMMANDS:
        assert f"\n  {name} " in overview[1]
        assert call(run, *name.split(), "--help")[1].startswith(f"usage: run.py {name} ")
    for script, arguments in ((run, ()), (run, ("inspect",)), (build_engines, ())):
        assert call(script, *arguments, "--version") == (0, f"qwen2vl-trt {__version__}\n", "")


ASK = ("--prompt", "x")
WRONG_INPUT = {
    ("--prompt", ""): "the prompt is empty",
    ("--prompt", " \n"): "the prompt is empty",
    ("--prompt", "<image> <image>", "--image", "a.png"): ": 2; images given: 1",
    ("--prompt", "<image>", "--image", "a.png", "--image", "b.jpg"): "images given: 2",
    ("--prompt", "a " * 300): "prompt has",
    ("--prompt", "a\udcff"): r"character 2 of the text is '\udcff', a lone surrogate",
    ("--prompt", "<|image_pad|>", "--allow-special-tokens"): "which only the chat template may write",
    (*ASK, "--max-tokens", "500"): "Lower max_tokens to",
    (*ASK, "--image", "none.png"): "image 1 (none.png): no such file",
    (*ASK, "--image", ""): "image 1 (): an empty name",
    (*ASK, "--image", "a.png", "--image", "empty.png"): "image 2 (empty.png): empty (0 bytes)",
    (*ASK, "--image", "text.png"): "image 1 (text.png): not an image",
    (*ASK, "--image", "cut.png"): "image 1 (cut.png): truncated or corrupt",
    (*ASK, "--image", "wide.png"): "image 1 (wide.png): 2500x10 has an aspect ratio of 250",
    (*ASK, "--image", "bomb.png"): "image 1 (bomb.png): 60000x60000 is 3,600,000,000 pixels",
    (*ASK, "--image", "big.png", "--strict-size"): "image 1 (big.png) (500x700) needs 216 patches; this engine takes",
    (*ASK, "--image", "v.mp4"): "not an image",
    (*ASK, "--video", "a.txt"): "video 1 (a.txt): no such file",
    (*ASK, "--video", "text.png"): "video 1 (text.png)",
    (*ASK, "--image", "a.png", "--min-pixels", "9000", "--max-pixels", "8000"): "min_pixels 9000 and max_pixels 8000",
    (*ASK, "--image", "a.png", "--min-pixels", "-5"): "min_pixels is -5; it must be at least 1",
    (*ASK, "--image", "a.png", "--max-pixels", "0"): "max_pixels is 0; it must be at least 1",
    (*ASK, "--max-pixels", "9000"): "--max-pixels has nothing to act on; add --image or --video, or leave it out",
    (*ASK, "--resized-height", "56", "--resized-width", "56"): "--resized-height has nothing to act on",
    (*ASK, "--image", "a.png", "--fps", "1"): "--fps has nothing to act on; add --video, or leave it out",
    (*ASK, "--image", "a.png", "--nframes", "4"): "--nframes has nothing to act on; add --video",
    (*ASK, "--video", "v.mp4", "--min-pixels", "9000"): "--min-pixels has nothing to act on; add --image, or",
    (*ASK, "--image", "file:///none/a.png"): "image 1 (file:///none/a.png): no such file",
    (*ASK, "--video", "a.png"): "video 1 (a.png): a still image, not a video; give it as an image",
}
WRONG_OPTIONS = {
    ("generate",): "required: --prompt",
    ("bogus",): "unknown command 'bogus'",
    (*ASK, "--bogus"): "--bogus",
    (*ASK, "--decode", "disk"): "--decode: invalid choice: 'disk'",
    ("generate", *ASK, "--model", "unknown", "--device", "cpu", "--decode", "gpu"): "needs a GPU",  # before a build
    (*ASK, "--max-tokens", "many"): "--max-tokens",
    (*ASK, "--max-tokens", "0"): "max_tokens is 0",
    (*ASK, "--max-tokens", "-3"): "max_tokens is -3",
    (*ASK, "--temperature", "nan"): "temperature is nan",
    (*ASK, "--temperature", "-1"): "temperature is -1",
    (*ASK, "--temperature", "inf"): "temperature is inf",
    (*ASK, "--top-p", "0"): "top_p is 0",
    (*ASK, "--top-k", "-1"): "top_k is -1",
    (*ASK, "--repetition-penalty", "nan"): "repetition_penalty is nan",
    (*ASK, "--repetition-penalty", "1e-300"): "repetition_penalty is 1e-300; it must be a number from 0.0001 to 10000",
    (*ASK, "--repetition-penalty", "1e300"): "repetition_penalty is 1e+300",
    (*ASK, "--seed", "-1"): "seed is -1",
    (*ASK, "--stop", ""): "stop is",
    (*ASK, "--logit-bias", "5"): "--logit-bias: '5' is no ID=X",
    (*ASK, "--logit-bias", "x=2"): "--logit-bias: 'x=2' is no ID=X",
    (*ASK, "--logit-bias", "5=nan"): "logit_bias is {5: nan}",
    (*ASK, "--stop-token-ids", "x"): "--stop-token-ids: 'x' is not a whole number",
    (*ASK, "--logprobs", "2"): "--logprobs are printed with --json alone",
    (*ASK, "--regex", "a", "--choice", "b"): "--choice: not allowed with argument --regex",
    (*ASK, "--choice", ""): "structured_outputs.choice must be",
    (*ASK, "--json-schema", "none.json"): "--json-schema: none.json: No such file",
    (*ASK, "--json-schema", "a.png"): "--json-schema: a.png: 'utf-8' codec",
    (*ASK, "--grammar", "nothing"): "--grammar: nothing: Is a directory",
    (*ASK, "--json", "--stream"): "not allowed with",
    (*ASK, "--model", "nothing"): "config.json",
    (*ASK, "--model", "unknown"): "unknown model 'unknown'",
    (*ASK, "--model", "./none"): "no such folder",
    (*ASK, "--model", "a.png"): "unknown model 'a.png'",
    (*ASK, "--model", "Qwen2.5-VL-7B"): "huggingface.co",
    (*ASK, "--model", "model", "--backend", "abacus"): "invalid choice: 'abacus'",
    (*ASK, "--model", "model", "--precision", "fp64"): "fp64",
    (*ASK, "--model", "model", "--max-num-seqs", "0"): "--max-num-seqs is 0",
    (*ASK, "--model", "model", "--min-hw-dims", "99", "--max-hw-dims", "9"): "--min-hw-dims 99 is larger",
    (*ASK, "--model", "model", "--max-input-len", "99", "--max-seq-len", "99"): "--max-input-len 99",
    (*ASK, "--model", "model", "--revision", "main"): "revision",
    (*ASK, "--model", "model", "--engine-dir", "model"): "the checkpoint itself",
    (*ASK, "--config", "none.yaml"): "none.yaml cannot be read",
    (*ASK, "--config", "list.yaml"): "does not name its model",
    (*ASK, "--config", "limits.yaml"): "limits.yaml: --max-batch-size is 0",
    (*ASK, "--config", "limits.yaml", "--model", "tiny"): "limits.yaml",
    (*ASK, "--precision", "fp16"): "fp16-decoder builds the decoder in FP16",
    (
        *ASK,
        "--backend",
        "onnxruntime",
        "--precision",
        "fp16-decoder",
    ): "cannot be built in 'fp16-decoder', only in fp32",
    (
        *ASK,
        "--precision",
        "fp32",
        "--calibration-size",
        "8",
    ): "--calibration-size is for --precision fp8 and int4 (--quant-method awq), not for fp32",
    (
        *ASK,
        "--precision",
        "int8",
        "--calibration-data",
        "nothing",
    ): "--calibration-data is for --precision fp8 and int4 (--quant-method awq), not for int8",
    (
        *ASK,
        "--precision",
        "int4",
        "--quant-method",
        "rtn",
        "--calibration-size",
        "8",
    ): "--calibration-size is for --precision fp8 and int4 (--quant-method awq), not for --quant-method rtn",
    (*ASK, "--precision", "fp32", "--quant-method", "rtn"): "--quant-method is for --precision int4, not for fp32",
    (*ASK, "--precision", "nvfp4", "--quant-method", "awq"): "--quant-method is for --precision int4, not for nvfp4",
    (*ASK, "--precision", "int4", "--quant-method", "gptq"): "--quant-method: invalid choice: 'gptq'",
    (*ASK, "--model", "model", "--precision", "int4"): "quantising model to INT4 needs images",
    (*ASK, "--precision", "fp8", "--calibration-size", "0"): "--calibration-size is 0; it must be at least 1",
    (*ASK, "--model", "model", "--precision", "fp8"): "quantising model to FP8 needs images",
    (*ASK, "--precision", "fp8", "--calibration-data", "nothing"): "--calibration-data nothing holds no",
    (*ASK, "--engine-dir", "none"): "there is no folder none",
    (*ASK, "--engine-dir", "nothing"): "nothing holds no engine",
    (*ASK, "--engine-dir", "a.png"): "a.png is a file; a folder is needed",
    ("features", "--output", "f.safetensors"): "one of the arguments --input --image is required",
    ("features", "--input", "nothing", "--output", "new"): "nothing: no image there",
    ("features", "--input", "file:///none", "--output", "new"): "error: /none: there is no such folder",
    ("features", "--input", "a.png", "--output", "new", "--workers", "0"): "'0' is not a whole number of at least 1",
    ("features", "--image", "a.png", "--output", "none/f.safetensors"): "there is no folder none",
    ("features", "--image", "a.png", "--output", "a.png"): "a.png is a file; name a folder",
    ("eval", "--cases", "-1"): "--cases: '-1' is not a whole number",
}
WRONG_OPTIONS |= {
    ("bench", "seed"): "invalid choice: 'seed' (choose from ",
    ("bench", "--json", "build"): "bench build is a command: it comes before the options",
    ("compere",): "unknown command 'compere'; there are generate, serve",
}
WITH_ENGINES = {
    (*ASK, "--max-batch-size", "4"): "runs as it was built",
    (*ASK, "--precision", "bf16"): "runs as it was built",
    (*ASK, "--device", "abacus"): "unknown device 'abacus'",
    (*ASK, "--device", "cuda:99"): "cuda:99",
    (*ASK, "--device", "cpu", "--decode", "gpu"): "(--decode gpu) needs a GPU, and the engines run on cpu",
    (*ASK, "--device", "cuda", "--decode", "gpu"): "[gpu-decode]'",
    (
        *("features", "--image", "b.jpg", "--output", "g.safetensors"),
        *("--device", "cpu", "--decode", "gpu"),
    ): "needs a GPU, and the engines run on cpu",
    ("features", "--image", "a.png", "--image", "a.png", "--output", "g.safetensors"): "a.png is given twice",
    ("features", "--image", "cut.png", "--output", "g.safetensors"): "image 1 (cut.png)",
    ("features", "--image", "big.png", "--strict-size", "--output", "g.safetensors"): "image 1 (big.png) (500x700)",
}


def assert_one_line(found, message, arguments):
    code, out, errors = found
    assert code == 2, (arguments, found)
    assert out == "", arguments
    assert errors.startswith("error: "), (arguments, errors)
    assert errors.count("\n") == 1, (arguments, errors)
    assert errors.endswith("\n")
    for part in message.split(": "):
        assert part in errors, (arguments, errors)


def test_wrong_input_is_one_line(call, quick):
    for arguments, message in WRONG_INPUT.items():
        assert_one_line(call(run, *quick, *arguments), message, arguments)
    for arguments, message in WITH_ENGINES.items():
        assert_one_line(call(run, *arguments, *quick), message, arguments)
    assert not Path("g.safetensors").exists()


def test_wrong_options_are_one_line(call, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for arguments, message in WRONG_OPTIONS.items():
        assert_one_line(call(run, *arguments), message, arguments)
        if arguments[:2] == ASK and "--model" in arguments:
            assert_one_line(call(build_engines, *arguments[2:]), message, arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name is empty"),
        ("loop", "Too many levels of symbolic links"),
        ("loop/x", "Too many levels of symbolic links"),
        ("pipe", "is a pipe or a device; a folder is needed"),
        ("a.png", "is a file; a folder is needed"),
        ("dangling", "is a link to nowhere, which is not there"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_name_that_cannot_be_a_folder_is_one_line(call, user, name, message):
    if not (user / "pipe").exists():
        os.mkfifo(user / "pipe")
        (user / "loop").symlink_to("loop")
        (user / "dangling").symlink_to("nowhere")
    before = sorted(user.iterdir())
    for script, *arguments in (
        (build_engines, "--model", "model", "--force", "--engine-dir"),
        (run, *ASK, "--engine-dir"),
        (run, "inspect"),
        (run, "batch", "--input", "a.png", "--task", "features", "--output"),
    ):
        assert_one_line(call(script, *arguments, name), message, (arguments, name))
    if name != "a.png":
        assert_one_line(call(build_engines, "--model", name), "model", name)
    assert sorted(user.iterdir()) == before


def test_a_home_of_nobody_is_one_line(call):
    assert_one_line(call(build_engines, "--model", "~nobody-of-this-name/x"), "there is no such folder", "~")


def test_what_a_build_would_be_wasted_on_is_known_before_it(call, user):
    shutil.copytree(user / "model", user / "silent")
    (user / "silent" / "chat_template.jinja").unlink()
    (user / "wrong.jinja").write_text("{% for %}")
    for script, *arguments, message in (
        (run, *ASK, "--model", "model", "--image", "none.png", "image 1 (none.png): no such file"),
        (run, *ASK, "--model", "model", "--image", "a.png", "--video", "a.mp4", "video 1 (a.mp4): no such file"),
        (run, *ASK, "--model", "model", "--chat-template", "none.jinja", "none.jinja: No such file"),
        (run, *ASK, "--model", "model", "--chat-template", "wrong.jinja", "given: the chat template cannot be"),
        (run, *ASK, "--model", "silent", "silent has no chat template"),
        (build_engines, "--model", "silent", "silent has no chat template"),
    ):
        assert_one_line(call(script, *arguments, "--engine-dir", "early"), message, arguments)
        assert not Path("early").exists(), arguments


SPOILED = {
    "generation_config.json": (
        {"eos_token_id": 10**6},
        {"temperature": "hot"},
        {"num_beams": 4},
        {"repetition_penalty": 1e300},
    ),
    "preprocessor_config.json": ({"min_pixels": []}, {"do_resize": False}, {"patch_size": 16}),
    "video_preprocessor_config.json": ({"fps": "fast"}, {"unheard_of": 1}, {"cap_pixels_per_frame": True}),
    "tokenizer.json": ("{", {"model": None}),
    "tokenizer_config.json": ("{",),
    "chat_template.jinja": ("{% for %}", "{{ 1 / 0 }}"),
    "config.json": ({"image_token_id": 5}, {"video_token_id": 6}),
}


def test_a_bad_file_of_a_checkpoint_is_known_before_the_build(call, user, monkeypatch):
    built = []
    monkeypatch.setattr("qwen2vl_trt.building.folder.build_engines", lambda *arguments: built.append(arguments))
    for file, faults in SPOILED.items():
        for fault in faults:
            shutil.rmtree(user / "spoiled", ignore_errors=True)
            shutil.copytree(user / "model", user / "spoiled")
            path = user / "spoiled" / file
            if not isinstance(fault, str):
                fault = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fault)
            path.write_text(fault)
            for script, *arguments in ((run, *ASK), (build_engines,)):
                found = call(script, *arguments, "--model", "./spoiled", "--backend", "torch", "--engine-dir", "early")
                assert_one_line(found, f"spoiled: {file}", (file, fault))
                assert (built, Path("early").exists()) == ([], False), (file, fault)


def test_a_damaged_engine_is_one_line(call, quick, user):
    assert call(build_engines, "--model", "model", "--backend", "torch", "--engine-dir", "damaged", *LIMITS)[0] == 0
    engine = ("--engine-dir", "damaged", *ASK)
    manifest, weights = user / "damaged" / "manifest.json", user / "damaged" / "model.safetensors"
    whole = manifest.read_text()
    for text, message in (
        (whole.replace(f'"format": {FORMAT}', '"format": 0'), "format 0"),
        (whole[: len(whole) // 2], "cannot be read"),
        (whole.replace("max_seq_len", "max_length"), "corrupt"),
        ("[]", "format None"),
    ):
        manifest.write_text(text)
        assert_one_line(call(run, *engine), message, text)
    manifest.write_text(whole)
    content = weights.read_bytes()
    weights.unlink()  # a hard link to the checkpoint: never write through it
    assert_one_line(call(run, *engine), "damaged", "no weights")
    weights.write_bytes(content[:-100])
    assert_one_line(call(run, *engine), "truncated", "short weights")
    assert call(build_engines, "--model", "model", "--backend", "torch", "--engine-dir", "damaged", *LIMITS)[0] == 0
    assert call(run, *engine, "--max-tokens", 1)[0] == 0


def test_the_way_out_is_logged_once(call, quick, caplog):
    with caplog.at_level(logging.WARNING):
        call(run, *quick, *ASK, "--max-tokens", 2)
    assert not caplog.records


# In processes of their own


def start(user, *arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=user,
        stdout=kwargs.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # Shells start background jobs with SIGINT ignored, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def finish(process, timeout=300):
    out, errors = process.communicate(timeout=timeout)
    return process.returncode, (out or b"").decode(), errors.decode()


def test_an_interrupt_is_one_word_and_code_130(user, call, quick):
    answering = start(user, ROOT / "run.py", *quick, *ASK, "--max-tokens", 350, "--ignore-eos", "--stream")
    assert answering.stdout.read(1)
    answering.send_signal(signal.SIGINT)
    building = start(
        user,
        ROOT / "build_engines.py",
        "--model",
        "model",
        "--backend",
        "onnxruntime",
        "--precision",
        "fp32",
        "--engine-dir",
        "stopped",
        *LIMITS,
    )
    while not (user / "stopped" / ".building" / "model.safetensors").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    building.send_signal(signal.SIGINT)
    for process in (answering, building):
        code, _, errors = finish(process)
        assert (code, errors) == (130, "interrupted\n")
    assert not (user / "stopped" / "manifest.json").exists()
    assert_one_line(call(run, "--engine-dir", "stopped", *ASK), "holds no engine", "stopped")


SHELL = """
import os, shlex, sys
os.execv("/bin/sh", ["sh", "-c", f"exec {shlex.join(sys.argv[2:])} {sys.argv[1]}"])
"""
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *others):
        if name == module:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass  # as C code does that an import calls
_, module, script, *arguments = sys.argv
sys.argv = [script, *arguments]
sys.path.insert(0, os.path.dirname(script))
sys.meta_path.insert(0, Finder())
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "script", "arguments"),
    [
        ("dataclasses", "run.py", ("generate", *ASK, "--model", "none")),
        ("qwen2vl_trt.commands.process", "build_engines.py", ("--model", "./none")),
        ("qwen2vl_trt.engines.backends", "run.py", ("generate", *ASK, "--model", "none")),
        ("torch", "build_engines.py", ("--model", "./none")),
    ],
)
def test_an_interrupt_of_an_import_is_not_lost(user, module, script, arguments):
    found = finish(start(user, "-c", INTERRUPTED_IMPORT, module, ROOT / script, *arguments))
    assert found == (130, "", "interrupted\n")


def test_terminated(user, quick):
    (user / "photos").mkdir()
    for number in range(2000):
        os.link(user / "a.png", user / "photos" / f"{number}.png")
    output = user / "terminated"
    features = ("features", "--input", "photos", "--output", output, "--shard-size", 50)
    extracting = start(user, ROOT / "run.py", *features, *quick)
    answering = start(user, ROOT / "run.py", *quick, *ASK, "--max-tokens", 350, "--ignore-eos", "--stream")
    assert answering.stdout.read(1)
    answering.terminate()
    assert finish(answering)[::2] == (143, "terminated\n")
    while not (output / "features-00000.safetensors").exists():
        assert extracting.poll() is None
        time.sleep(0.02)
    extracting.terminate()
    code, _, errors = finish(extracting)
    saved = int(errors.removeprefix("terminated: ").split()[0].replace(",", ""))
    assert (code, saved) == (143, len((output / "index.jsonl").read_text().splitlines()))
    assert 50 <= saved < 2000


def test_stdout_that_is_full_closed_or_gone(user, quick):
    ask = (ROOT / "run.py", *quick, *ASK, "--max-tokens", 60, "--ignore-eos")
    gone = [start(user, *ask, form) for form in ("--stream", "--json")]
    with Path("/dev/full").open("wb") as full:
        disk = start(user, *ask, stdout=full)
    for process in gone:
        process.stdout.close()
    for process in gone:
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == b""
    code, _, errors = finish(disk)
    assert (code, errors) == (1, "error: stdout: No space left on device\n")


def test_an_answer_that_nobody_gets_is_an_error(user, quick):
    for closing, reason, *arguments in (
        (">&-", "Bad file descriptor", *quick, *ASK),
        (">/dev/full", "No space left on device", "inspect", quick[1]),
        (">/dev/full", "No space left on device", "generate", "--help"),
        (">/dev/full", "No space left on device", "--version"),
    ):
        command = (ROOT / "run.py", *arguments)
        found = finish(start(user, "-c", SHELL, closing, sys.executable, *command))
        assert found == (1, "", f"error: stdout: {reason}\n"), arguments
    code, out, _ = finish(start(user, "-c", SHELL, "2>&-", sys.executable, ROOT / "run.py", "bogus"))
    assert (code, out) == (2, "")


def test_two_builds_at_once(user):
    # A precision, because the default on a CPU is tried out: beside each other, the two may find other ones faster.
    given = ("--model", "model", "--backend", "torch", "--precision", "fp32", "--engine-dir", "shared", *LIMITS)
    build = (ROOT / "build_engines.py", *given)
    ended = [finish(process)[::2] for process in [start(user, *build) for _ in range(2)]]
    # The second says that it waits, if it comes while the first is at work.
    found = sorted((code, errors.splitlines()[-1]) for code, errors in ended)
    assert found == [(0, "shared: built"), (0, "shared: up to date")]


HEAVY = "torch", "onnxruntime", "transformers", "onnx", "huggingface_hub"


@pytest.mark.parametrize("command", [*COMMANDS, "build"])
def test_help_and_wrong_options_import_nothing_slow(command):
    """They are to end in a tenth of a second, not in PyTorch's two."""
    code = f"""import sys
from qwen2vl_trt import commands
for argument in ("--help", "--no-such-option"):
    try:
        commands.build_main([argument]) if {command!r} == "build" else commands.main([*{command.split()}, argument])
    except SystemExit as end:
        print(end.code, end=" ")
print([name for name in {HEAVY} if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 2 []\n"), done.stdout[-300:]
    assert done.stderr.count("\n") == 1


def test_engines_that_are_there_run_without_the_packages_of_an_export(engines, user):
    """ONNX IR brings SymPy: 0.4 s of a start."""
    arguments = [*map(str, engines), "--prompt", "Hello", "--max-tokens", "1"]
    code = f"import sys; from qwen2vl_trt import commands; commands.main({arguments}); print('onnx_ir' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=user, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


def test_help_has_groups_the_everyday_ones_first(call):
    for arguments in (
        (run, "generate"),
        (run, "features"),
        (run, "batch"),
        (run, "bench"),
        (run, "eval"),
        (build_engines,),
    ):
        _, out, _ = call(*arguments, "--help")
        assert out.index("\noptions:") < out.index("\nmodel and engines:") < out.index("\nTensorRT:"), arguments


def test_options_that_mean_the_same_are_spelt_the_same():
    """``--json`` is a flag, ``--model`` a name, wherever they are."""
    kinds = {}
    for name in [*COMMANDS, "build"]:
        parser = make_parser(name, import_module(f"qwen2vl_trt.commands.{name.replace(' ', '_')}"))
        for action in parser._actions:
            for option in action.option_strings:
                kinds.setdefault(option, {}).setdefault(action.nargs == 0, []).append(name)
    differing = {option: names for option, names in kinds.items() if len(names) > 1}
    assert differing.keys() <= {"--layers"}, (
        differing
    )  # of a benchmark's model a number; of a report, whether to list them
    assert not {"--num-workers", "--partition-rows", "--models"} & kinds.keys()


def completions(line):
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    with tempfile.NamedTemporaryFile("r") as file:
        environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": file.name}
        command = [sys.executable, "-m", "qwen2vl_trt"]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, check=False)
        return {word.strip() for word in file.read().split("\n")}


def test_a_shell_completes_commands_options_and_choices():
    pytest.importorskip("argcomplete")
    assert {"bench", "features", "generate", "plan"} <= completions("qwen2vl-trt ")
    assert completions("qwen2vl-trt bench b") == {"build"}
    assert completions("qwen2vl-trt bench build --calibration-d") == {"--calibration-data"}
    assert "tensorrt-rtx" in completions("qwen2vl-trt features --backend ")


@pytest.mark.parametrize(("error", "line"), [(MemoryError(), "out of memory"), (OSError(28, "full"), "stdout: full")])
def test_what_the_system_refuses_is_one_line(call, monkeypatch, error, line):
    def refuse():
        raise error

    monkeypatch.setattr(run, "main", refuse)
    assert call(run) == (1, "", f"error: {line}\n")


def test_a_missing_package_is_one_line(user):
    found = finish(start(user, "-S", "-E", ROOT / "run.py", *ASK))  # -S: without site-packages
    assert_one_line(found, "is not installed", "without packages")
