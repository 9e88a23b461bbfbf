"""What every runner is asked, as arrays that Transformers' processor makes; and our preprocessor beside it.

Letters: P patches of all images, then of all videos; D ``qwen2_vl_dim``; S tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polygraphy.common import TensorMetadata
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import CheckpointError, LimitError, reason
from qwen2vl_trt.messages import to_messages
from qwen2vl_trt.prompts import PromptBuilder
from qwen2vl_trt.runtime.inputs.images import ImageSource, load_image
from qwen2vl_trt.runtime.inputs.video import Video, load_video
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor, PreprocessorSettings
from qwen2vl_trt.windows import Grid, grids_of

from .recorder import in_patch_order
from .tolerance import PIXELS, TOKENS

Feed = dict[str, np.ndarray]

FORCED = "forced_ids"
"""``[n]`` tokens that the answer must take; empty where the runner answers greedily."""
MAX_TOKENS = "max_tokens"
"""``[1]`` of a greedy answer."""


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
    from qwen2vl_trt.tiny.scenes import held_out_scenes

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


def input_metadata(dim: int) -> TensorMetadata:
    """What a feed holds, in Polygraphy's words."""
    return (
        TensorMetadata()
        .add(PIXELS, np.float32, (None, dim))
        .add("image_grid_thw", np.int64, (None, 3))
        .add("video_grid_thw", np.int64, (None, 3))
        .add("second_per_grid_ts", np.float32, (None,))
        .add(TOKENS, np.int64, (None,))
        .add(FORCED, np.int64, (None,))
        .add(MAX_TOKENS, np.int64, (1,))
    )


def grids(feed: Mapping[str, Any]) -> tuple[tuple[Grid, ...], tuple[Grid, ...]]:
    """Of the images and of the videos."""
    images, videos = (grids_of(feed[name].tolist()) for name in ("image_grid_thw", "video_grid_thw"))
    return images, videos


class TransformersProcessor:
    """Transformers' processor of a checkpoint.

    Raises:
        CheckpointError: it cannot be loaded.
    """

    def __init__(self, folder: Path, settings: PreprocessorSettings, dim: int) -> None:
        from transformers import AutoProcessor

        self._settings, self._dim = settings, dim
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # Transformers has no common base for what it raises
            raise CheckpointError(f"{folder}: Transformers cannot load its processor: {reason(error)}") from None

    def __call__(self, case: Case, max_tokens: int) -> Feed:
        """What a runner is fed for a case; ``max_tokens`` of its answer."""
        from PIL import Image
        from transformers.video_utils import VideoMetadata

        text = self._processor.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=True)
        media: dict[str, Any] = {}
        if case.images:
            media["images"] = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in case.images]
            media["images_kwargs"] = {"size": _size(self._settings.image)}
        if case.videos:
            media["videos"] = [stacked(video) for video in case.videos]
            media["videos_kwargs"] = {
                "size": _size(self._settings.video),
                "do_sample_frames": False,  # they are sampled already
                "video_metadata": [VideoMetadata(total_num_frames=len(v.frames), fps=v.fps) for v in case.videos],
                "fps": [video.fps for video in case.videos] if len(case.videos) > 1 else case.videos[0].fps,
            }
        made = self._processor(text=[text], **media, return_tensors="pt")
        patches = [made[name].float() for name in ("pixel_values", "pixel_values_videos") if name in made]
        no_grid, no_seconds = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0)
        return {
            PIXELS: (torch.cat(patches) if patches else torch.zeros(0, self._dim)).numpy(),
            "image_grid_thw": made.get("image_grid_thw", no_grid).numpy(),
            "video_grid_thw": made.get("video_grid_thw", no_grid).numpy(),
            "second_per_grid_ts": torch.as_tensor(made.get("second_per_grid_ts", no_seconds)).float().numpy(),
            TOKENS: made["input_ids"][0].numpy(),
            FORCED: np.zeros(0, np.int64),
            MAX_TOKENS: np.array([max_tokens]),
        }


def check_limits(case: Case, feed: Feed, profile: BuildProfile, config: Qwen2VLConfig) -> None:
    """Refuse a case that the engine's limits do not take, and shorten its answer to what they leave.

    Raises:
        LimitError: naming the case and what is too large or too small in it.
    """
    images, videos = grids(feed)
    sizes = [image.shape for image in case.images] + [stacked(video).shape for video in case.videos]
    names = [f"image {n + 1}" for n in range(len(images))] + [f"video {n + 1}" for n in range(len(videos))]
    for name, grid, size in zip(names, images + videos, sizes, strict=True):
        profile.check_frame(grid, f"case {case.name!r}, {name}", f"{size[-1]}x{size[-2]}", config.vision)
    if len(feed[TOKENS]) > profile.max_input_len:
        raise LimitError(
            f"case {case.name!r} has {len(feed[TOKENS]):,} tokens; these engines take {profile.max_input_len:,}"
            " (--max-input-len). Give your own --prompt and --image, shrink images (--max-pixels), or rebuild."
        )
    feed[MAX_TOKENS] = np.minimum(feed[MAX_TOKENS], profile.max_seq_len - len(feed[TOKENS]))


def our_inputs(
    cases: Sequence[Case], checkpoint: Checkpoint, settings: PreprocessorSettings, device: torch.device
) -> Iterator[Feed]:
    """Pixels and tokens of our preprocessor and prompt builder; pixels in FP32, not rounded to an engine's type."""
    config = checkpoint.config
    preprocessor = Preprocessor(config.vision, settings, device, torch.float32)
    prompts = PromptBuilder(checkpoint.folder, config)
    for case in cases:
        grids: tuple[Grid, ...] = ()
        outputs: Feed = {}
        if case.images or case.videos:
            packed = preprocessor.preprocess(list(case.images), list(case.videos))
            grids = packed.grids
            outputs[PIXELS] = in_patch_order(packed.pixel_values, packed.layout, config.vision).cpu().numpy()
        count = len(case.images)
        outputs[TOKENS] = np.array(prompts.build(case.messages, grids[:count], grids[count:]).token_ids)
        yield outputs


def _size(settings: Any) -> dict[str, int]:
    return {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
