"""What is asked of every runner: real pictures and prompts, chosen for the model unless the user brings some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.messages import to_messages
from qwen2vl_trt.runtime.inputs.images import ImageSource, load_image
from qwen2vl_trt.runtime.inputs.video import Video, load_video
from qwen2vl_trt.runtime.preprocessing.preprocessor import PreprocessorSettings


@dataclass(frozen=True)
class Case:
    """One request, its media decoded.

    Attributes:
        name: in the report.
        messages: in Qwen's form, media left out.
        images: ``[3, H, W]`` uint8 each.
        videos: sampled frames ``[3, H, W]`` uint8 and their rate.
    """

    name: str
    messages: list[dict[str, Any]]
    images: tuple[Tensor, ...] = ()
    videos: tuple[Video, ...] = ()


def user_case(
    prompt: str, images: Sequence[str | Path], videos: Sequence[str | Path], settings: PreprocessorSettings
) -> Case:
    """The request that a user gives, as ``run.py generate`` would read it.

    Raises:
        MediaError: an image or a video cannot be read.
        PromptError: the prompt's places do not match the media.
    """
    messages = to_messages(prompt, len(images), len(videos))
    pixels = [load_image(path, name=f"image {number}") for number, path in enumerate(images, start=1)]
    clips = [
        load_video(path, sampling=settings.sampling, name=f"video {number}")
        for number, path in enumerate(videos, start=1)
    ]
    return Case("yours", messages, tuple(pixels), tuple(clips))


def digit_cases() -> list[Case]:
    """For the tiny model: held-out handwritten digits in every task that it knows, and a question without a picture."""
    from qwen2vl_trt.tiny.evaluation import held_out_scenes

    chosen = [("read", (0, 1, 2)), ("count", (0,)), ("two_images", (0, 1, 2)), ("video", (0, 2))]
    cases = []
    for task, numbers in chosen:
        scenes = held_out_scenes(task, max(numbers) + 1, seed=0)
        for number in numbers:
            scene = scenes[number]
            cases.append(
                Case(
                    f"{task.replace('_', ' ')} {number + 1}",
                    scene.messages,
                    tuple(map(load_image, scene.images)),
                    tuple(Video([load_image(frame) for frame in frames], fps) for frames, fps in scene.videos),
                )
            )
    return [*cases, _case("text", "Who are you?")]


def photograph_cases() -> list[Case]:
    """For every other model: scikit-learn's two photographs, whole and cut to other sizes, a pan over one, and text."""
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images  # [427, 640, 3] each
    pan = [load_image(temple[100:324, 24 * step : 24 * step + 336].copy()) for step in range(8)]
    return [
        _case("temple", "Describe the image.", [temple]),
        _case("flower, a tall cut", "What is in the image?", [flower[:, 200:396].copy()]),
        _case("temple, a strip", "What is in the image?", [temple[180:260].copy()]),
        _case("a pair", "What differs between <image> and <image>?", [flower, temple[60:396, 40:376].copy()]),
        _case("a pan", "What does the video show?", videos=[Video(pan, 2.0)]),
        _case("text", "Name three rivers in Europe."),
    ]


def _case(name: str, prompt: str, images: Sequence[ImageSource] = (), videos: Sequence[Video] = ()) -> Case:
    messages = to_messages(prompt, len(images), len(videos))
    return Case(name, messages, tuple(map(load_image, images)), tuple(videos))


def stacked(video: Video) -> Tensor:
    """Frames ``[T, 3, H, W]``."""
    return torch.stack([load_image(frame) for frame in video.frames])
