"""``run.py inspect``: what it says is what was built, for every backend."""

import os
import re
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.inspect import inspect_folder
from qwen2vl_trt.engines.inspect_table import print_report
from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.engines.profile import usual_profile
from qwen2vl_trt.engines.tensorrt_profiles import vision_ranges
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.preprocessing.settings import PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.sizes import SizeRules
from tests.support.engine_folders import PROFILE, build


def printed(folder, layers=False):
    """The lines, with single spaces."""
    out = StringIO()
    print_report(inspect_folder(folder), Console(file=out, soft_wrap=True, width=1000), layers)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_a_narrow_terminal_cuts_nothing(folder):
    report = inspect_folder(folder)
    words = []
    for width in (40, 60, 1000):
        out = StringIO()
        print_report(report, Console(file=out, soft_wrap=True, width=width), layers=True)
        words.append(set(out.getvalue().split()))
    assert words[0] == words[1] == words[2]


@pytest.fixture(scope="module")
def built(rtx_checkpoint, tmp_path_factory):
    """Do not write into it."""
    return build(rtx_checkpoint, tmp_path_factory.mktemp("inspect") / "engines", "onnxruntime", "fp32")


@pytest.fixture
def to_damage(built, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "engines"))


@pytest.fixture(scope="module", params=["torch fp32", "torch bf16", "onnxruntime fp32", "tensorrt-rtx bf16"])
def folder(request, rtx_checkpoint, tmp_path_factory):
    backend, precision = request.param.split()
    if backend == "tensorrt-rtx":
        request.getfixturevalue("trt")
        return request.getfixturevalue("rtx_engines").folder(precision)
    if backend == "onnxruntime":
        return request.getfixturevalue("built")
    return build(rtx_checkpoint, tmp_path_factory.mktemp("inspect") / "engines", backend, precision)


def test_limits_are_shown_for_every_backend(folder):
    manifest, lines = Manifest.read(folder), printed(folder)
    assert f"backend {manifest.backend}, {manifest.precision}" in lines
    assert "largest image 180 patches, about 182 x 182 pixels" in lines
    assert "largest photo unshrunk 196 x 140 (4:3), 252 x 140 (16:9)" in lines
    assert "smallest image 4 patches, about 28 x 28 pixels" in lines
    assert "tokens of the largest image 45" in lines
    assert "images or frames a vision call 4" in lines
    assert "prompt 400 tokens, images included" in lines
    assert "prompt and answer 700 tokens" in lines
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    assert f"model.safetensors {megabytes:,.2f} weights, hard-linked" in lines
    assert all(version in " ".join(lines) for version in manifest.versions.values())


def test_a_graphs_inputs_are_shown_where_there_is_one(folder, rtx_checkpoint):
    manifest, lines, text = Manifest.read(folder), printed(folder), Checkpoint(rtx_checkpoint).config.text
    if manifest.backend == "torch":
        assert inspect_folder(folder).graphs == ()
        return
    dtype = manifest.precision.upper()
    capacity = PROFILE.max_seq_len if manifest.backend == "tensorrt-rtx" else "max_seq_len"
    cache = f"{dtype} batch x {text.num_key_value_heads} x {capacity} x {text.head_dim}"
    assert f"in k_cache_0..1 {cache}" in lines
    assert f"out new_v_cache_0..1 {cache}" in lines
    assert f"in pixel_values {dtype} windows x slots x 1176" in lines
    assert f"out logits FP32 batch x {text.vocab_size}" in lines
    assert f"Attention {dtype} 2" in lines
    assert "RotaryEmbedding FP32 4" in lines
    assert f"model.layers.1.mlp.down_proj.Gemm Gemm {dtype}" in printed(folder, layers=True)


def test_profiles_are_those_of_the_build(folder, rtx_checkpoint):
    manifest, lines = Manifest.read(folder), printed(folder)
    if manifest.backend != "tensorrt-rtx":
        assert not any("profile" in line for line in lines)
        return
    windows = vision_ranges(PROFILE, Checkpoint(rtx_checkpoint).config.vision)["windows"]
    assert f"windows {windows.least} {windows.usual} {windows.most}" in lines
    after = lines[lines.index("decoder, profile generation least usual most") :]
    assert after[1:3] == ["batch 1 4 4", "sequence 1 1 1"]


def test_weights_that_were_copied(rtx_checkpoint, tmp_path):
    folder = build(rtx_checkpoint, tmp_path / "engines", "torch")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    assert any(line.endswith("weights, a copy of their own") for line in printed(folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "kernels and weights"), ({"strip_weights": True}, "kernels; weights are read from the safetensors")],
)
def test_where_the_weights_of_a_plan_are(trt, rtx_engines, tmp_path, options, said):
    folder = shutil.copytree(rtx_engines.folder("bf16"), tmp_path / "engines")
    replace(Manifest.read(folder), options=options).write(folder)
    lines = printed(folder)
    for name in ("vision.engine", "decoder.engine"):
        assert any(line.startswith(name) and line.endswith(said) for line in lines)
    assert ("strip_weights True" in lines) == bool(options)


def test_a_folder_without_an_engine_is_refused(tmp_path):
    with pytest.raises(EngineError, match="holds no engine"):
        inspect_folder(tmp_path)


def test_a_damaged_graph(to_damage):
    (to_damage / "vision.onnx").write_bytes(b"damaged")
    with pytest.raises(EngineError, match=r"vision\.onnx is not the file that was built"):
        inspect_folder(to_damage)


def test_every_byte_is_read_when_asked(to_damage, command):
    path = to_damage / "vision.onnx"
    stat, content = path.stat(), bytearray(path.read_bytes())
    said = "as built: every byte of decoder.onnx, vision.onnx; of the weights the header and both ends of every tensor"
    assert command("inspect", to_damage, "--verify")[1].splitlines()[-1] == said
    content[-9] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    said = f"error: {path} is not the file that was built (SHA-256 differs). Rebuild.\n"
    assert command("inspect", to_damage, "--verify")[::2] == (2, said)


def test_the_command_prints_a_report_or_one_line(folder, command):
    code, out, errors = command("inspect", folder)
    assert (code, errors) == (0, "")
    assert "largest image" in out
    code, out, errors = command("inspect", "nowhere")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"error: there is no folder nowhere. Build one with \S.*build\S* --model MODEL --engine-dir nowhere\.\n", errors
    )


def test_the_checkpoints_own_limit_of_pixels_bounds_the_largest_photo(tmp_path, command):
    """Tiny's, of 50,176 pixels, is smaller than that of its engines."""
    folder = build(resolve_model("tiny").folder, tmp_path / "engines", "torch", profile=usual_profile("tiny"))
    (line,) = [line.split() for line in command("inspect", folder)[1].splitlines() if "unshrunk" in line]
    assert " ".join(line) == "largest photo unshrunk 224 x 168 (4:3), 280 x 168 (16:9)"
    rules = SizeRules(Checkpoint(folder).config.vision, PreprocessorSettings.from_folder(folder))
    for width, height in ((224, 168), (280, 168)):
        size = rules.image(height, width)
        assert (size.resized_width, size.resized_height) == (width, height)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x08", b"half"], ids=["empty", "noise", "short", "half"])
def test_a_corrupt_graph_is_one_line(to_damage, content):
    """Of the size and the time that it was built with, as bits that the disk lost leave it."""
    for name in ("vision.onnx", "decoder.onnx"):
        path = to_damage / name
        stat, whole = path.stat(), path.read_bytes()
        path.write_bytes(
            whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2) if content == b"half" else content
        )
        with path.open("ab") as file:
            file.truncate(len(whole))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for verify, said in ((False, "is corrupt"), (True, "is not the file that was built (SHA-256 differs)")):
            with pytest.raises(EngineError) as refused:
                inspect_folder(to_damage, verify)
            assert str(path) in str(refused.value)
            assert said in str(refused.value)
            assert "\n" not in str(refused.value)
        path.write_bytes(whole)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
