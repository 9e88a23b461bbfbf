"""What quantisation is calibrated with: requests, and the samples that the pipeline's own preprocessor makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import BuildError, MediaError, Qwen2VLError, reason
from qwen2vl_trt.export.model_optimizer import CalibrationSample
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.prompts import PromptBuilder
from qwen2vl_trt.runtime.inputs.image_formats import image_suffixes
from qwen2vl_trt.runtime.inputs.image_listing import list_images
from qwen2vl_trt.runtime.inputs.video import Video
from qwen2vl_trt.runtime.preprocessing.preprocessor import PackedPixels, Preprocessor, PreprocessorSettings
from qwen2vl_trt.runtime.preprocessing.sizes import Medium
from qwen2vl_trt.runtime.request import Request
from qwen2vl_trt.tiny.scenes import ROWS_UNTIL, training_scenes
from qwen2vl_trt.windows import Grid

PROMPTS_FILE = "prompts.jsonl"
DEFAULT_PROMPT = "Describe the image."
_TINY_SEED = 0


@dataclass(frozen=True)
class CalibrationData:
    """Requests to calibrate with, and a text that another choice of them does not have."""

    requests: list[Request]
    identity: str

    @classmethod
    def from_folder(cls, folder: Path, size: int) -> CalibrationData:
        """At most ``size`` requests of a folder, spread evenly over it.

        Lines ``{"image": "a.jpg", "prompt": "..."}`` of ``prompts.jsonl`` where there is one (``image`` may be a list,
        or missing for text alone). Else every image that ``features`` would find there, in that order, with what a
        text file of its name says (``a.txt`` beside ``a.jpg``) or ``Describe the image.``

        Raises:
            BuildError: no such folder, no image in it, a file that cannot be read, or a line that makes no sense.
        """
        if not folder.is_dir():
            raise BuildError(f"--calibration-data {folder}: there is no such folder")
        path = folder / PROMPTS_FILE
        try:
            pairs = _listed_pairs(path) if path.is_file() else _image_pairs(folder)
            if not pairs:
                suffixes = ", ".join(sorted(image_suffixes()))
                raise BuildError(f"--calibration-data {folder} holds no {PROMPTS_FILE} and no image ({suffixes})")
            if size < len(pairs):
                pairs = [pairs[number * len(pairs) // size] for number in range(size)]
            digest = hashlib.sha256()
            for prompt, images in pairs:
                digest.update(
                    repr((prompt, [hashlib.sha256(image.read_bytes()).digest() for image in images])).encode()
                )
        except MediaError as error:
            raise BuildError(f"--calibration-data: {error}") from None
        except UnicodeDecodeError as error:
            raise BuildError(f"--calibration-data {folder}: a text file in it is not UTF-8 ({error})") from None
        except OSError as error:
            raise BuildError(f"--calibration-data: {error.filename} cannot be read: {reason(error)}") from None
        return cls([Request(prompt, images) for prompt, images in pairs], digest.hexdigest())


def training_data(size: int) -> CalibrationData:
    """For the tiny model: the first ``size`` scenes of its training's last phase, of all tasks."""
    requests: list[Request] = []
    step = ROWS_UNTIL
    while len(requests) < size:
        for scene in training_scenes(_TINY_SEED, step):
            videos = [Video(frames, fps) for frames, fps in scene.videos]
            requests.append(Request(scene.messages, scene.images, videos))
        step += 1
    return CalibrationData(requests[:size], f"training scenes of seed {_TINY_SEED} from step {ROWS_UNTIL}")


def _image_pairs(folder: Path) -> list[tuple[str, list[Path]]]:
    pairs = []
    for file in list_images(str(folder)):
        image = Path(file.path)
        prompt = image.with_suffix(".txt")
        text = prompt.read_text(encoding="utf-8").strip() if prompt.is_file() else ""
        pairs.append((text or DEFAULT_PROMPT, [image]))
    return pairs


def _listed_pairs(path: Path) -> list[tuple[str, list[Path]]]:
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            images, prompt = entry.get("image", []), entry.get("prompt", DEFAULT_PROMPT)
            images = [images] if isinstance(images, str) else images
            pairs.append((str(prompt), [path.parent / image for image in images]))
        except (ValueError, AttributeError, TypeError):
            raise BuildError(
                f'{path}, line {number} is not of the form {{"image": "a.jpg", "prompt": "..."}}'
            ) from None
    return pairs


class Calibration:
    """Samples of a model from requests."""

    def __init__(self, checkpoint: Checkpoint, data: CalibrationData) -> None:
        self._config, self._data = checkpoint.config, data
        settings = PreprocessorSettings.from_folder(checkpoint.folder)
        self._preprocessor = Preprocessor(checkpoint.config.vision, settings)
        self._prompts = PromptBuilder(checkpoint.folder, checkpoint.config)

    def check(self) -> None:
        """Read every image and build every prompt, before the minutes that calibration takes.

        Raises:
            BuildError: an image cannot be read or a prompt does not fit its images, named.
        """
        for request in self._data.requests:
            self._prepare(request)

    def __iter__(self) -> Iterator[CalibrationSample]:
        """The samples, each made when its turn comes; raises as :meth:`check`."""
        return map(self._sample, self._data.requests)

    def _prepare(self, request: Request) -> tuple[list[Medium], list[Medium], list[int]]:
        """A request's images, its videos and its tokens: all that can be wrong with it is known."""
        named = [image for image in request.images if isinstance(image, (str, Path))]
        make = self._preprocessor
        try:
            images = [make.load_image(image, "image") for image in request.images]
            videos = [make.load_video(video, "video") for video in request.videos]
            prompt = self._prompts.build(request.prompt, _grids(images), _grids(videos))
        except Qwen2VLError as error:
            raise BuildError(f"calibration data{', ' if named else ''}{', '.join(map(str, named))}: {error}") from None
        return images, videos, prompt.token_ids

    def _sample(self, request: Request) -> CalibrationSample:
        images, videos, token_ids = self._prepare(request)
        still = self._preprocessor.pack(images) if images else None
        moving = self._preprocessor.pack(videos) if videos else None
        image_grids, video_grids = _grids(images), _grids(videos)
        seconds = [video.size.second_per_grid for video in videos]
        position_ids, _ = rope_index(token_ids, self._config, image_grids, video_grids, seconds)
        return CalibrationSample(
            torch.tensor(token_ids), position_ids, self._patches(still), image_grids, self._patches(moving), video_grids
        )

    def _patches(self, packed: PackedPixels | None) -> Tensor | None:
        """From windows to Transformers' order: the merge groups of each picture, row by row."""
        if packed is None:
            return None
        groups = packed.pixel_values.view(-1, self._config.vision.merge_unit, self._config.vision.qwen2_vl_dim)
        return groups[packed.layout.merge_index].flatten(0, 1)


def _grids(media: list[Medium]) -> list[Grid]:
    return [medium.size.grid for medium in media]
