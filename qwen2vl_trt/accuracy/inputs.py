"""From a case to the arrays that every runner is fed, made by Transformers' processor; and our preprocessor beside it.

Letters: P patches of all images, then of all videos; D ``qwen2_vl_dim``; S tokens of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import CheckpointError, LimitError
from qwen2vl_trt.prompts import PromptBuilder
from qwen2vl_trt.runtime.preprocessing.preprocessor import Preprocessor, PreprocessorSettings
from qwen2vl_trt.windows import Grid, grids_of

from .cases import Case, stacked
from .tolerance import PIXELS, TOKENS

Feed = dict[str, np.ndarray]

FORCED = "forced_ids"
"""``[n]`` tokens that the answer must take; empty where the runner answers greedily."""
MAX_TOKENS = "max_tokens"
"""``[1]`` of a greedy answer."""


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
            raise CheckpointError(f"{folder}: Transformers cannot load its processor: {_one_line(error)}") from None

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


class ProcessorRunner(BaseRunner):
    """Transformers' processor as a Polygraphy runner: a feed is the number of a case."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        super().__init__(name="Transformers' processor")
        self._feeds = feeds

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("case", np.int64, (1,))

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Feed:
        self.inference_time = 0.0  # they were made before
        feed = self._feeds[int(feed_dict["case"][0])]
        return {name: feed[name] for name in (PIXELS, TOKENS) if len(feed[name])}


class PreprocessorRunner(BaseRunner):
    """Our preprocessor and prompt builder, likewise; pixels in FP32, before they are rounded to an engine's type."""

    def __init__(
        self, cases: Sequence[Case], checkpoint: Checkpoint, settings: PreprocessorSettings, device: torch.device
    ) -> None:
        super().__init__(name="preprocessor")
        self._cases, self._checkpoint, self._settings, self._device = cases, checkpoint, settings, device

    def activate_impl(self) -> None:
        config = self._checkpoint.config
        self._preprocessor = Preprocessor(config.vision, self._settings, self._device, torch.float32)
        self._prompts = PromptBuilder(self._checkpoint.folder, config)

    def deactivate_impl(self) -> None:
        del self._preprocessor, self._prompts

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("case", np.int64, (1,))

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> Feed:
        case, unit = self._cases[int(feed_dict["case"][0])], self._checkpoint.config.vision.merge_unit
        start = time.perf_counter()
        images: tuple[Grid, ...] = ()
        videos: tuple[Grid, ...] = ()
        outputs: Feed = {}
        if case.images or case.videos:
            packed = self._preprocessor.preprocess(list(case.images), list(case.videos))
            images, videos = packed.grids[: len(case.images)], packed.grids[len(case.images) :]
            groups = packed.pixel_values.flatten(0, 1).unflatten(0, (-1, unit))[packed.layout.merge_index]
            outputs[PIXELS] = groups.flatten(0, 1).cpu().numpy()
        outputs[TOKENS] = np.array(self._prompts.build(case.messages, images, videos).token_ids)
        self.inference_time = time.perf_counter() - start
        return outputs


def _size(settings: Any) -> dict[str, int]:
    return {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
