"""Calibration data: what a folder gives, what is wrong with one, and samples as Transformers' processor makes them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl_trt.building.calibration import DEFAULT_PROMPT, Calibration, CalibrationData, training_data
from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError
from qwen2vl_trt.export.model_optimizer import arguments_of
from qwen2vl_trt.hub import resolve_model
from qwen2vl_trt.runtime.request import Request


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for name, height, width in (("a.png", 60, 90), ("b.JPG", 120, 40), ("more/c.webp", 56, 56)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("Which digits?\n")
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def checkpoint():
    return Checkpoint(resolve_model("tiny").folder)


class TestFolder:
    def test_images_with_and_without_prompts(self, folder):
        requests = CalibrationData.from_folder(folder, 10).requests
        found = [
            (request.prompt, [image.relative_to(folder).as_posix() for image in request.images]) for request in requests
        ]
        assert found == [(DEFAULT_PROMPT, ["a.png"]), ("Which digits?", ["b.JPG"]), (DEFAULT_PROMPT, ["more/c.webp"])]

    def test_the_images_are_those_of_a_features_run(self, folder):
        """Every suffix that is read, a folder's own before those inside it, nothing hidden."""
        for name in ("z.jfif", "d.ppm", ".hidden.png", "more/.thumb.jpg"):
            (folder / name).write_bytes((folder / "a.png").read_bytes())
        requests = CalibrationData.from_folder(folder, 10).requests
        assert [request.images[0].name for request in requests] == ["a.png", "b.JPG", "d.ppm", "z.jfif", "c.webp"]

    def test_listed(self, folder):
        lines = [{"image": "more/c.webp", "prompt": "A"}, {"prompt": "B"}, {"image": ["a.png", "b.JPG"], "prompt": "C"}]
        (folder / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
        requests = CalibrationData.from_folder(folder, 10).requests
        assert [(r.prompt, [image.name for image in r.images]) for r in requests] == [
            ("A", ["c.webp"]),
            ("B", []),
            ("C", ["a.png", "b.JPG"]),
        ]

    def test_a_part_is_spread_over_it(self, folder):
        for number in range(30):
            (folder / f"z{number:02}.png").write_bytes((folder / "a.png").read_bytes())
        names = [request.images[0].name for request in CalibrationData.from_folder(folder, 3).requests]
        assert names == ["a.png", "z09.png", "z20.png"]

    def test_identity(self, folder):
        first = CalibrationData.from_folder(folder, 10).identity
        assert CalibrationData.from_folder(folder, 10).identity == first
        assert CalibrationData.from_folder(folder, 2).identity != first
        (folder / "b.txt").write_text("What is there?")
        second = CalibrationData.from_folder(folder, 10).identity
        (folder / "a.png").write_bytes((folder / "b.JPG").read_bytes())
        assert len({first, second, CalibrationData.from_folder(folder, 10).identity}) == 3


class TestWhatIsWrong:
    def test_no_folder(self, tmp_path):
        with pytest.raises(BuildError, match=r"--calibration-data .*nowhere: there is no such folder"):
            CalibrationData.from_folder(tmp_path / "nowhere", 4)

    def test_nothing_in_it(self, tmp_path):
        (tmp_path / "a.txt").write_text("a prompt alone")
        with pytest.raises(BuildError, match=r"holds no prompts\.jsonl and no image \(\.avif, \.bmp, "):
            CalibrationData.from_folder(tmp_path, 4)

    @pytest.mark.parametrize("line", ["{", "[1]", '{"image": 3}', '{"image": [1]}'])
    def test_a_line(self, folder, line):
        (folder / "prompts.jsonl").write_text('{"image": "a.png"}\n' + line)
        with pytest.raises(BuildError, match=re.escape('prompts.jsonl, line 2 is not of the form {"image": "a.jpg"')):
            CalibrationData.from_folder(folder, 4)

    def test_a_listed_image_that_is_missing(self, folder):
        (folder / "prompts.jsonl").write_text('{"image": "gone.png"}')
        with pytest.raises(BuildError, match=r"--calibration-data: .*gone\.png cannot be read: No such file"):
            CalibrationData.from_folder(folder, 4)

    def test_prompts_that_are_no_text(self, folder):
        (folder / "b.txt").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(BuildError, match="a text file in it is not UTF-8"):
            CalibrationData.from_folder(folder, 4)

    def test_an_image_that_is_none(self, folder):
        (folder / "a.png").write_bytes(b"no image")
        with pytest.raises(BuildError, match=r"calibration data, .*a\.png: "):
            Calibration(checkpoint(), CalibrationData.from_folder(folder, 4)).check()

    def test_a_prompt_that_does_not_fit(self, folder):
        (folder / "b.txt").write_text("<image> and <image>")
        with pytest.raises(BuildError, match=r"calibration data, .*b\.JPG: "):
            Calibration(checkpoint(), CalibrationData.from_folder(folder, 4)).check()


def test_samples_are_what_transformers_processor_makes(folder):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(resolve_model("tiny").folder)
    images = [folder / "a.png", folder / "b.JPG"]
    data = CalibrationData([Request("What digits are in the images?", images)], "")
    (sample,) = Calibration(checkpoint(), data)
    found = arguments_of(sample, "cpu")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What digits are in the images?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = processor(
        text=[text], images=[Image.open(image).convert("RGB") for image in images], return_tensors="pt"
    )
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert (found["pixel_values"].float() - expected["pixel_values"]).abs().max() < 0.06  # 8-bit steps, and BF16
    assert found["position_ids"].shape == (3, 1, found["input_ids"].shape[1])
    assert set(found) == {"input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw"}


def test_the_tiny_models_own_data():
    """All tasks of its training, videos included."""
    data = training_data(120)
    assert len(data.requests) == 120
    assert {(len(request.images), len(request.videos)) for request in data.requests} >= {(1, 0), (2, 0), (0, 1)}
    (sample,) = Calibration(checkpoint(), CalibrationData([next(r for r in data.requests if r.videos)], ""))
    assert set(arguments_of(sample, "cpu")) >= {"pixel_values_videos", "video_grid_thw"}
    assert sample.position_ids[0].max() > 0
