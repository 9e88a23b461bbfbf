"""Vision embeddings in a file: whole or not at all, and no surprise after the work."""

import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qwen2vl_trt.errors import FeaturesError, LimitError, MediaError
from runtime.features import check_output, save_features


@pytest.fixture
def images(tmp_path):
    paths = []
    for number in range(6):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (40 + 20 * number, 100, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_image_is_stored_under_its_path(pipeline, images, tmp_path):
    output = tmp_path / "out" / "features.safetensors"
    output.parent.mkdir()
    output.write_text("an older file")
    save_features(pipeline, images, output)
    found = load_file(output)
    assert list(found) == [str(path) for path in images]
    for path, embedding in zip(images, pipeline.embed_images(images)):
        assert torch.equal(found[str(path)], embedding)
    assert names(output.parent) == ["features.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert output.stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_image_that_fails_leaves_the_old_file(pipelines, images, tmp_path):
    output = tmp_path / "features.safetensors"
    output.write_text("an older file")
    images[4].write_bytes(images[4].read_bytes()[:300])
    Image.new("RGB", (700, 500)).save(images[5])
    before = names(tmp_path)
    with pytest.raises(MediaError, match=r"image 5 .*4\.png.*truncated"):
        save_features(pipelines["torch"], images, output)
    with pytest.raises(MediaError, match=r"0\.png is given twice"):
        save_features(pipelines["torch"], [images[0], images[1], images[0]], output)
    with pytest.raises(LimitError, match=r"image 1, .*5.png .700x500"):
        save_features(pipelines["torch"], images[5:], output)
    assert output.read_text() == "an older file"
    assert names(tmp_path) == before


def test_what_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(FeaturesError, match="there is no folder"):
        check_output(tmp_path / "missing" / "f.safetensors")
    with pytest.raises(FeaturesError, match="is a folder"):
        check_output(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(FeaturesError, match="read-only"):
        check_output(tmp_path / "f.safetensors")


def test_a_full_disk(pipelines, images, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(FeaturesError, match="No space left on device"):
            save_features(pipelines["torch"], images, disk / "f.safetensors")
        assert names(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
