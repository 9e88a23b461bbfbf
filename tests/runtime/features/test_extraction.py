"""Features of many images: the numbers, the memory, the errors, and that a kill neither loses nor repeats an image."""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from qwen2vl_trt import Pipeline, PipelineOptions, Request
from qwen2vl_trt.commands import features
from qwen2vl_trt.commands.options import pipeline_options
from qwen2vl_trt.errors import FeaturesError, LimitError, MediaError, PromptError
from qwen2vl_trt.runtime.features.shards import shard_paths
from qwen2vl_trt.runtime.features.sources import DecoderFeatures, VisionFeatures
from tests.support import features_process
from tests.support.bounds import FP32, FP32_BEHIND_BOTH
from tests.support.engine_folders import PROFILE, build
from tests.support.feature_files import stored
from tests.support.media_files import save_images
from tests.support.models import relative_error

needs_fork = pytest.mark.skipif(features_process.CONTEXT is None, reason="needs fork, to start processes quickly")
PROMPT = "What digits are in the image?"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine images in two folders, by key."""
    folder = save_images(tmp_path_factory.mktemp("images") / "in", 9)
    (folder / "more").mkdir()
    for number in (7, 8):
        (folder / f"{number:04d}.png").rename(folder / "more" / f"{number - 7:04d}.png")
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def folder(images):
    return images["0000.png"].parent


def extract(pipeline, *options):
    from qwen2vl_trt.commands.options import Parser

    def open_pipeline(arguments):
        asked = pipeline_options(arguments)
        return pipeline if asked == pipeline.options else Pipeline(pipeline.engines, asked)

    parser = Parser()
    features.add_arguments(parser)
    features.run(parser.parse_args([str(option) for option in options]), open_pipeline)


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert relative_error(found[key], value) < FP32_BEHIND_BOTH, key


# The numbers


def test_stored_tokens_are_the_pipelines(pipeline, images, folder, tmp_path, capsys):
    extract(pipeline, "--input", folder, "--output", tmp_path / "out", "--shard-size", 4)
    expected = dict(zip(images, pipeline.embed_images(list(images.values()))))
    assert_equal(stored(tmp_path / "out"), expected)
    assert [len(load_file(path)) for path in shard_paths(tmp_path / "out")] == [4, 4, 1]
    index = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [line["image"] for line in index] == list(images)
    assert [line["shape"] for line in index] == [list(tensor.shape) for tensor in expected.values()]
    assert [line["grid"] for line in index[:2]] == [[1, 4, 6], [1, 8, 10]]
    assert "out: 9 images, " in capsys.readouterr().err
    extract(pipeline, "--input", folder, "--output", tmp_path / "mean", "--pool", "mean", "--batch-tokens", 1)
    assert_equal(stored(tmp_path / "mean"), {key: tensor.mean(0) for key, tensor in expected.items()})


def test_one_file_holds_all_and_is_never_overwritten_unasked(pipelines, images, folder, tmp_path):
    output = tmp_path / "f.safetensors"
    given = [option for path in images.values() for option in ("--image", path)]
    extract(pipelines["torch"], *given, "--output", output, "--shard-size", 2)
    paths = list(images.values())
    assert_equal(load_file(output), dict(zip(map(str, paths), pipelines["torch"].embed_images(paths))))
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    for again in ((), ("--resume",)):
        with pytest.raises(FeaturesError, match=r"f\.safetensors exists already; --overwrite makes it again"):
            extract(pipelines["torch"], *given, "--output", output, *again)
    extract(pipelines["torch"], "--input", folder / "more", "--output", output, "--overwrite")
    assert sorted(load_file(output)) == ["0000.png", "0001.png"]
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["grids"])["0000.png"] == [1, 8, 10]


def reference_inputs(reference, path, text):
    _, processor = reference
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(text=[prompt], images=[Image.open(path)], return_tensors="pt")


def test_vision_tokens_are_those_of_transformers(pipelines, reference, images, folder, tmp_path):
    extract(pipelines["torch"], "--input", folder, "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    for key, path in list(images.items())[:3]:
        inputs = reference_inputs(reference, path, PROMPT)
        embeds = reference[0].model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        assert relative_error(found[key], embeds.pooler_output[0]) < FP32


def test_decoder_states_are_those_of_transformers(pipeline, reference, images, folder, tmp_path):
    options = ("--source", "decoder", "--prompt", PROMPT)
    extract(pipeline, "--input", folder, "--output", tmp_path / "out", *options)
    found = stored(tmp_path / "out")
    assert sorted(found) == sorted(images)
    for key, path in list(images.items())[:3]:
        inputs = reference_inputs(reference, path, PROMPT)
        with torch.no_grad():
            expected = reference[0](**inputs, output_hidden_states=True).hidden_states[-1][0]
        assert relative_error(found[key], expected) < FP32_BEHIND_BOTH


@pytest.mark.parametrize(("source", "batches"), [(VisionFeatures, [1] * 9), (DecoderFeatures, [4, 4, 1])])
def test_a_batch_is_as_large_as_the_engine_of_the_source_takes(
    checkpoint, images, folder, tmp_path, monkeypatch, source, batches
):
    profile = replace(PROFILE, max_batch_size=1)
    pipeline = Pipeline.from_engine_dir(build(checkpoint, tmp_path / "engines", "torch", profile=profile), "cpu")
    found, made = [], source.extract
    monkeypatch.setattr(source, "extract", lambda self, batch: found.append(len(batch)) or made(self, batch))
    options = () if source is VisionFeatures else ("--source", "decoder", "--prompt", PROMPT)
    extract(pipeline, "--input", folder, "--output", tmp_path / "out", *options)
    assert found == batches


@pytest.fixture
def own_pipeline(engine_dirs):
    """A pipeline that a test may cut short."""
    return Pipeline.from_engine_dir(engine_dirs["torch"], "cpu")


@pytest.mark.parametrize("layer", [1, 2])
def test_states_after_a_decoder_layer(own_pipeline, reference, images, folder, tmp_path, layer):
    options = ("--source", "decoder", "--prompt", PROMPT, "--layer", layer)
    extract(own_pipeline, "--input", folder, "--output", tmp_path / "out", *options)
    path = images["0001.png"]
    with torch.no_grad():
        states = reference[0](**reference_inputs(reference, path, PROMPT), output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert relative_error(stored(tmp_path / "out")["0001.png"], states[layer][0]) < FP32_BEHIND_BOTH


@pytest.mark.parametrize("layer", [1, 2])
def test_patches_after_a_vision_block(own_pipeline, reference, images, folder, tmp_path, layer):
    extract(own_pipeline, "--input", folder, "--output", tmp_path / "out", "--layer", layer)
    tower = reference[0].model.visual
    taken = []
    hook = tower.blocks[layer - 1].register_forward_hook(lambda module, inputs, output: taken.append(output))
    try:
        path = images["0001.png"]
        inputs = reference_inputs(reference, path, PROMPT)
        with torch.no_grad():
            tower(inputs["pixel_values"], inputs["image_grid_thw"])
    finally:
        hook.remove()
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    # From window order to the processor's (groups of 2 x 2 patches in raster order), from that to raster order.
    from transformers.vision_utils import get_vision_window_index

    config = reference[0].config.vision_config
    order, _ = get_vision_window_index(inputs["image_grid_thw"], 2, config.window_size, config.patch_size)
    groups = taken[0].reshape(len(order), 4, -1)[torch.argsort(order)]
    expected = groups.view(rows // 2, columns // 2, 2, 2, -1).transpose(1, 2).reshape(rows * columns, -1)
    found = stored(tmp_path / "out")
    assert found["0001.png"].shape == (rows * columns, config.hidden_size)
    assert relative_error(found["0001.png"], expected) < FP32


# What is wrong


def test_bad_images_are_named_and_skipped(pipelines, images, tmp_path, capsys):
    folder = tmp_path / "in"
    save_images(folder, 8)
    whole = (folder / "0003.png").read_bytes()
    (folder / "0003.png").write_bytes(whole[:200])
    (folder / "0004.jpg").write_text("no image")
    Image.new("RGB", (700, 500)).save(folder / "large.png")
    Path(folder / "not-\udcff-unicode.png").write_bytes(whole)
    output = tmp_path / "out"
    extract(pipelines["torch"], "--input", folder, "--output", output, "--shard-size", 3, "--strict-size")
    good = [f"{number:04d}.png" for number in (0, 1, 2, 4, 5, 6, 7)]
    expected = dict(zip(good, pipelines["torch"].embed_images([folder / name for name in good])))
    assert_equal(stored(output), expected)
    errors = {
        line["image"]: line["error"] for line in map(json.loads, (output / "errors.jsonl").read_text().splitlines())
    }
    reasons = {
        "0003.png": "image 4 ",
        "0004.jpg": "not an image",
        "large.png": "needs 216 patches",
        "not-\\udcff-unicode.png": "not valid UTF-8",
    }
    assert {key: reasons[key] in reason for key, reason in errors.items()} == dict.fromkeys(reasons, True)
    assert (
        f"warning: images that could not be used and were skipped: 4, see {output}/errors.jsonl"
        in capsys.readouterr().err
    )
    (folder / "0003.png").write_bytes(whole)
    extract(pipelines["torch"], "--input", folder, "--output", output, "--resume", "--strict-size")
    assert "1 image, 7 were there" in capsys.readouterr().err
    assert sorted(stored(output)) == sorted([*good, "0003.png"])
    assert len((output / "errors.jsonl").read_text().splitlines()) == 3
    file = tmp_path / "f.safetensors"
    extract(pipelines["torch"], "--input", folder, "--output", file, "--strict-size")
    assert len(load_file(file)) == 8
    assert len((tmp_path / "f.errors.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "f.safetensors.parts").exists()


def test_whatever_an_image_is_called(pipelines, tmp_path, monkeypatch, capsys):
    """Every shard is read by safetensors, and each image is in one or in errors.jsonl."""
    monkeypatch.chdir(tmp_path)
    content = (save_images(tmp_path / "in", 1) / "0000.png").read_bytes()
    (tmp_path / "in" / "0000.png").unlink()
    good = ["a\nb.png", "\x7f\u2028.png", 'quote"\\.png', "\u00e9.png", "e\u0301.png", " .png", f"{'ü' * 120}.png"]
    for name in (*good, "__metadata__", "\udcff.png"):
        (tmp_path / "in" / name).write_bytes(content)
    (expected,) = pipelines["torch"].embed_images([content])
    for output in ("out", "f.safetensors"):
        extract(pipelines["torch"], "--input", "in/*", "--output", output, "--shard-size", 4)
        found = stored(tmp_path / "out") if output == "out" else load_file(output)
        assert_equal(found, dict.fromkeys(good, expected))
        path = Path("out/errors.jsonl" if output == "out" else "f.errors.jsonl")
        errors = {line["image"]: line["error"] for line in map(json.loads, path.read_text().splitlines())}
        assert sorted(errors) == ["\\udcff.png", "__metadata__"]
        assert "('in/__metadata__'): safetensors keeps this name for itself; rename it" in errors["__metadata__"]
        assert "images that could not be used and were skipped: 2" in capsys.readouterr().err
    monkeypatch.chdir("in")
    extract(pipelines["torch"], "--image", "./__metadata__", "--output", tmp_path / "given")
    assert_equal(stored(tmp_path / "given"), {"./__metadata__": expected})
    with pytest.raises(FeaturesError, match=r"none of the 1 images could be used; the first: .* keeps this name"):
        extract(pipelines["torch"], "--image", "__metadata__", "--output", tmp_path / "new")


def test_what_lies_in_the_folder_and_is_passed_over(pipelines, tmp_path, capsys):
    folder = save_images(tmp_path / "in", 2)
    (folder / "below").mkdir()
    for name in ("1.xcf", "2.XCF", "below/3.xcf", "below/notes.txt", "README", ".hidden.xcf"):
        (folder / name).touch()
    (folder / "circle").symlink_to(folder)
    extract(pipelines["torch"], "--input", folder, "--output", tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    assert "/out: 2 images, " in said[0]
    assert said[1:] == ["passed over: 3 .xcf, 1 .txt, 1 links to folders, 1 without a suffix"]
    with pytest.raises(MediaError, match=r"below: no image there, but 1 \.txt, 1 \.xcf"):
        extract(pipelines["torch"], "--input", folder / "below", "--output", tmp_path / "none")


def test_no_good_image_at_all(pipelines, tmp_path):
    folder = save_images(tmp_path / "in", 2, [(500, 700)])
    for output in ("out", "f.safetensors"):
        with pytest.raises(
            FeaturesError, match=r"none of the 2 images could be used; the first: image 1 \(.*0000\.png\)"
        ):
            extract(pipelines["torch"], "--input", folder, "--output", tmp_path / output, "--strict-size")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.errors.jsonl", "in", "out"]
    assert (tmp_path / "out" / "errors.jsonl").exists()


def test_images_that_do_not_fit_are_resized_and_counted(pipelines, tmp_path, capsys):
    """The features are those of the limits that checkpoint and engine share."""
    folder = save_images(tmp_path / "in", 3, [(500, 700), (60, 80), (700, 500)])
    for number, options in enumerate([(), ("--source", "decoder", "--prompt", "x")]):
        extract(pipelines["torch"], "--input", folder, "--output", tmp_path / f"out{number}", *options)
        errors = capsys.readouterr().err
        assert "resized to fit the engine (4 to 180 patches): 2; --strict-size refuses them" in errors
        assert "skipped" not in errors
    limits = PipelineOptions(min_pixels=3136, max_pixels=180 * 14**2)
    files = sorted(folder.iterdir())
    fitted = Pipeline(pipelines["torch"].engines, limits).embed_images(files)
    assert_equal(stored(tmp_path / "out0"), dict(zip([file.name for file in files], fitted)))


def test_a_prompt_too_long_with_some_images(pipelines, folder, tmp_path):
    pipeline, small = pipelines["torch"], folder / "0002.png"
    once, twice = (len(pipeline.hidden_states([Request(n * "x ", [small])])[0]) for n in (1, 2))
    words = (1 + (400 - once) // (twice - once)) * "x "  # as many as fit with a small image
    extract(pipeline, "--input", folder, "--output", tmp_path / "out", "--source", "decoder", "--prompt", words)
    lines = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert all("tokens" in line["error"] for line in lines)
    assert sorted([*stored(tmp_path / "out"), *(line["image"] for line in lines)]) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    )
    assert len(lines) == 3  # the larger neighbours


def test_what_is_refused_before_the_work(pipelines, folder, tmp_path, monkeypatch):
    torch_pipeline, onnx = pipelines["torch"], pipelines["onnxruntime"]
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty").mkdir()
    for options, error, message in (
        (("--output", tmp_path / "no" / "out"), FeaturesError, "there is no folder"),
        (("--output", tmp_path / "file"), FeaturesError, "is a file; name a folder"),
        (("--output", tmp_path / "folder.safetensors"), FeaturesError, "is a folder; a name that ends in"),
        (("--output", tmp_path / "out", "--prompt", "x"), FeaturesError, "--source decoder needs a --prompt"),
        (("--output", tmp_path / "out", "--source", "decoder"), FeaturesError, "--source decoder needs a --prompt"),
        (("--output", tmp_path / "out", "--layer", 5), FeaturesError, "--layer 5: the vision has layers 1 to 2"),
        (("--output", tmp_path / "out", "--layer", 0), FeaturesError, "--layer 0: the vision has layers 1 to 2"),
        (("--output", tmp_path / "out", "--min-pixels", 9, "--max-pixels", 8), LimitError, "min_pixels 9"),
    ):
        with pytest.raises(error, match=message):
            extract(torch_pipeline, "--input", folder, *options)
    for source in ((), ("--source", "decoder", "--prompt", "x")):
        with pytest.raises(FeaturesError, match="--layer needs the torch backend: an engine of onnxruntime"):
            extract(onnx, "--input", folder, "--output", tmp_path / "out", "--layer", 1, *source)
    with pytest.raises(MediaError, match="no image there"):
        extract(torch_pipeline, "--input", tmp_path / "empty", "--output", tmp_path / "out")
    with pytest.raises(PromptError, match=": 2; images given: 1"):
        extract(torch_pipeline, "--input", folder, "--output", tmp_path / "out", "--source", "decoder",
                "--prompt", "<image><image>")  # fmt: skip
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(FeaturesError, match="read-only"):
        extract(torch_pipeline, "--input", folder, "--output", tmp_path / "new")


def test_a_resumed_run_must_be_the_same(pipelines, folder, tmp_path):
    options = ("--input", folder, "--output", tmp_path / "out")
    extract(pipelines["torch"], *options)
    with pytest.raises(FeaturesError, match="--resume goes on with it, --overwrite starts again"):
        extract(pipelines["torch"], *options)
    for changed, message in (
        (("--pool", "mean"), "begun with pool 'none', this run has 'mean'"),
        (("--max-pixels", 9408), "begun with max_pixels"),
        (("--image-pixel-limit", 99999), "begun with image_pixel_limit 100000000, this run has 99999"),
        (("--source", "decoder", "--prompt", "x"), "begun with prompt None, this run has 'x'"),
    ):
        with pytest.raises(FeaturesError, match=message):
            extract(pipelines["torch"], *options, *changed, "--resume")
    with pytest.raises(FeaturesError, match="begun with input"):
        extract(pipelines["torch"], "--input", folder / "more", "--output", tmp_path / "out", "--resume")
    before = stored(tmp_path / "out")
    extract(pipelines["onnxruntime"], *options, "--resume")  # another backend of the same precision goes on
    assert_equal(stored(tmp_path / "out"), before)


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 48 kB, and what makes room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o"]
    mounted = subprocess.run([*command, "size=48k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    yield disk, lambda: subprocess.run([*command, "remount,size=8m", str(disk)], check=True)
    gc.collect()  # maps of its files, which keep it busy
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["out", "f.safetensors"])
def test_a_full_disk(pipelines, images, folder, small_disk, name):
    disk, make_room = small_disk
    options = ("--input", folder, "--output", disk / name, "--shard-size", 2)
    with pytest.raises(
        FeaturesError, match=r"No space left on device; \d+ images are safe in .*: run again with --resume"
    ):
        extract(pipelines["torch"], *options)
    saved = stored(disk / (name if name == "out" else f"{name}.parts"))
    assert 0 < len(saved) < 9
    make_room()
    extract(pipelines["torch"], *options, "--resume")
    found = load_file(disk / name) if name != "out" else stored(disk / name)
    assert_equal(found, dict(zip(images, pipelines["torch"].embed_images(list(images.values())))))


# In processes of their own


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 240 images, two of them bad."""
    folder = save_images(tmp_path_factory.mktemp("many") / "in", 240)
    for name in ("0017.png", "0203.png"):
        (folder / name).write_text("no image")
    return folder


def wait_for(condition, process):
    deadline = time.monotonic() + 600
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@needs_fork
def test_killed_again_and_again(engine_dirs, many, tmp_path):
    options = ("--engine-dir", engine_dirs["torch"], "--device", "cpu", "--input", many, "--shard-size", 9)
    whole = features_process.start((*options, "--output", tmp_path / "whole"), tmp_path / "whole.log")
    whole.join(600)
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    output, rng, kills = tmp_path / "out", random.Random(0), 0
    for attempt in range(40):
        before = len(shard_paths(output))
        process = features_process.start((*options, "--output", output, "--resume"), tmp_path / f"{attempt}.log")
        goal = before + (rng.randrange(6) if kills < 4 else 1000)  # now to the end
        wait_for(lambda: len(shard_paths(output)) > goal, process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / f"{attempt}.log").read_text()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    found, expected = stored(output), stored(tmp_path / "whole")
    assert sorted(found) == sorted(expected)
    assert len(found) == 238
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for name in ("index.jsonl", "errors.jsonl"):
        assert (output / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert [path.name for path in shard_paths(output)] == [path.name for path in shard_paths(tmp_path / "whole")]


@needs_fork
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_run_goes_on_where_it_was(engine_dirs, many, tmp_path, number, code, word):
    output = tmp_path / "f.safetensors"
    options = ("--engine-dir", engine_dirs["torch"], "--device", "cpu", "--input", many, "--output", output)
    process = features_process.start((*options, "--shard-size", 7), tmp_path / "log")
    wait_for(lambda: shard_paths(tmp_path / "f.safetensors.parts"), process)
    second = features_process.start((*options, "--resume"), tmp_path / "second.log")
    process_was_alive = process.is_alive()
    os.kill(process.pid, number)
    process.join(600)
    saved = len(stored(tmp_path / "f.safetensors.parts"))  # the second may have gone on
    assert process.exitcode == code
    said = re.fullmatch(
        rf"{word}: (\d+) images are saved; run again with --resume to go on\n", (tmp_path / "log").read_text()
    )
    assert said
    assert 0 < int(said[1]) <= saved
    second.join(600)
    assert process_was_alive
    if second.exitcode:
        assert "another run is writing there" in (tmp_path / "second.log").read_text()
        second = features_process.start((*options, "--resume"), tmp_path / "third.log")
        second.join(600)
    assert second.exitcode == 0
    assert len(load_file(output)) == 238


@needs_fork
def test_memory_does_not_grow_with_the_number_of_images(engine_dirs, tmp_path):
    """300 images more: 70 MB of pixels, 7 MB of features."""
    image = save_images(tmp_path / "one", 1, [(280, 280)]) / "0000.png"
    peaks = []
    for count in (100, 400):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:04d}.png").symlink_to(image)
        options = ("--engine-dir", engine_dirs["torch"], "--device", "cpu", "--max-pixels", 35280, "--shard-size", 64)
        log = tmp_path / f"{count}.log"
        process = features_process.start((*options, "--input", folder, "--output", tmp_path / f"{count}-out"), log)
        process.join(600)
        assert process.exitcode == 0, log.read_text()
        assert len((tmp_path / f"{count}-out" / "index.jsonl").read_text().splitlines()) == count
        peaks.append(int(Path(f"{log}.peak").read_text()))
        shutil.rmtree(tmp_path / f"{count}-out")
    assert peaks[1] < peaks[0] + 5_000  # kilobytes
