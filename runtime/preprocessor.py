"""Images and videos become the vision graph's input: patches in window order, straight from the pixels.

Resize, normalise and patchify follow Transformers' ``Qwen2VLImageProcessor`` and ``Qwen2VLVideoProcessor``; only
the order of the patches differs, which is that of :func:`qwen2vl_trt.windows.window_layout`.

Letters: T temporal patch size, S slots of a window, W windows, D values of a patch (``qwen2_vl_dim``); H and W after
a 3 are the sides in pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import CheckpointError, LimitError, MediaError
from qwen2vl_trt.windows import Grid, WindowLayout, window_layout

from .images import ImageSource, load_image
from .video import FrameSampling, VideoSource, load_video

MAX_ASPECT_RATIO = 200

_CPU_CHUNK = 1 << 20
"""Values normalised at a time on the CPU: they stay in its caches on the way to the output."""

_DEVICE_CHUNK = 1 << 28
"""The same elsewhere: few kernels, and temporary memory that does not grow with the batch."""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size whose sides are multiples of ``factor`` and whose area lies within the limits, as in Transformers.

    Raises:
        MediaError: a side of 0 pixels, or an aspect ratio over 200.
    """
    if min(height, width) < 1:
        raise MediaError(f"{width}x{height} has no pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"{width}x{height} has an aspect ratio of {max(height, width) / min(height, width):.4g};"
            f" the model takes at most {MAX_ASPECT_RATIO}. Crop or pad it."
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:  # also where a side rounds to zero
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


@dataclass(frozen=True)
class PixelSettings:
    """Limits of the resized area, in pixels of one image or frame, and the normalisation of its values."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise LimitError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels}: min_pixels must be at least 1"
                " and at most max_pixels"
            )


@dataclass(frozen=True)
class PreprocessorSettings:
    """What a checkpoint says about pixels; the defaults are Transformers'."""

    image: PixelSettings = PixelSettings()
    video: PixelSettings = PixelSettings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)
    sampling: FrameSampling = field(default_factory=FrameSampling)

    @classmethod
    def from_folder(cls, folder: str | Path) -> PreprocessorSettings:
        """Read a checkpoint folder as Transformers does; what no file says keeps its default.

        Images: ``processor_config.json`` (Transformers 5 nests both processors there), else
        ``preprocessor_config.json``. Videos: the former, else ``video_preprocessor_config.json``, else that of images.

        Raises:
            CheckpointError: a file cannot be read, or asks for what the vision graph's input cannot be.
        """
        folder = Path(folder)
        nested = _read(folder / "processor_config.json")
        image = nested.get("image_processor") or _read(folder / "preprocessor_config.json")
        video = nested.get("video_processor") or _read(folder / "video_preprocessor_config.json") or image
        default = cls()
        frames = {name: video[name] for name in _SAMPLING if video.get(name) is not None}
        return cls(
            image=_pixel_settings(image, default.image, folder),
            video=_pixel_settings(video, default.video, folder),
            sampling=replace(default.sampling, **frames),
        )

    def with_limits(self, min_pixels: int | None = None, max_pixels: int | None = None) -> PreprocessorSettings:
        """Override the limits of images; video frames, which have their own, are only ever lowered by it.

        Raises:
            LimitError: ``min_pixels`` below 1 or above ``max_pixels``.
        """
        image = replace(
            self.image,
            min_pixels=self.image.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.image.max_pixels if max_pixels is None else max_pixels,
        )
        most = min(self.video.max_pixels, image.max_pixels) if max_pixels is not None else self.video.max_pixels
        video = replace(self.video, min_pixels=min(self.video.min_pixels, most), max_pixels=most)
        return replace(self, image=image, video=video)


_SAMPLING = ("fps", "min_frames", "max_frames", "temporal_patch_size")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _pixel_settings(raw: dict[str, Any], default: PixelSettings, folder: Path) -> PixelSettings:
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if raw.get(name) is False:
            raise CheckpointError(f"{folder}: the preprocessor's {name} is false, which is not supported")
    if raw.get("resample", 3) != 3:
        raise CheckpointError(f"{folder}: the preprocessor's resample is {raw['resample']}; only 3 (bicubic) is known")
    size = raw.get("size") or {}
    found = {  # min_pixels outside wins over size, as in Transformers; 4.x wrote it inside size as well
        "min_pixels": (raw.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
        "max_pixels": (raw.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
        "image_mean": (raw.get("image_mean"),),
        "image_std": (raw.get("image_std"),),
        "rescale_factor": (raw.get("rescale_factor"),),
    }
    fields: dict[str, Any] = {}
    for name, values in found.items():
        for value in values:
            if value is not None:
                fields[name] = tuple(value) if isinstance(value, list) else value
                break
    try:
        return replace(default, **fields)
    except LimitError as error:
        raise CheckpointError(f"{folder}: {error}") from None


@dataclass(frozen=True)
class PackedPixels:
    """One batch, ready for the vision graph.

    Attributes:
        pixel_values: ``[W, S, D]`` windows of all images, then of all videos; empty slots are zero.
        grids: ``(t, h, w)`` of each image, then of each video.
        layout: index tensors in the same order.
        second_per_grid_ts: seconds between temporal patches, one value a video.
    """

    pixel_values: Tensor
    grids: tuple[Grid, ...]
    layout: WindowLayout
    second_per_grid_ts: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Item:
    """An image, or a video of several frames ``[3, H, W]``."""

    frames: list[Tensor]
    grid: Grid
    settings: PixelSettings


class Preprocessor:
    """Turns images and videos into :class:`PackedPixels`.

    Args:
        config: the checkpoint's vision tower.
        settings: limits and normalisation, see :meth:`PreprocessorSettings.from_folder`.
        device: where the work is done and the output lies; pixels already there are not copied.
        dtype: of the output, torch.float32 or torch.bfloat16 (the FP32 values, rounded).
    """

    def __init__(
        self,
        config: VisionConfig,
        settings: PreprocessorSettings | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.settings = settings or PreprocessorSettings()
        self.device = torch.device(device)
        self.dtype = dtype

    def image_grid(self, height: int, width: int, *, name: str = "image") -> Grid:
        """Grid ``(1, h, w)`` that an image of this size will have; no pixel is needed.

        Raises:
            MediaError: a side of 0 pixels, or an aspect ratio over 200.
        """
        return self._grid(1, height, width, self.settings.image, name)

    def video_grid(self, frames: int, height: int, width: int, *, name: str = "video") -> Grid:
        """Grid ``(t, h, w)`` that this many frames of this size will have; raises as :meth:`image_grid`."""
        return self._grid(-(-frames // self.config.temporal_patch_size), height, width, self.settings.video, name)

    def preprocess(self, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> PackedPixels:
        """Resize, normalise and patchify a batch of any mix of sizes.

        Args:
            images: see :func:`~runtime.images.load_image`, which costs nothing for tensors it has loaded.
            videos: see :func:`~runtime.video.load_video`; files are sampled as ``settings.sampling`` says.

        Raises:
            MediaError: what the loaders and :meth:`image_grid` refuse, as ``image 2`` or ``video 1``.
            ValueError: nothing to preprocess.
        """
        if not images and not videos:
            raise ValueError("preprocess() needs at least one image or video")
        items, seconds = [], []
        for number, source in enumerate(images, start=1):
            image = load_image(source, name=f"image {number}")
            grid = self.image_grid(image.shape[1], image.shape[2], name=f"image {number}")
            items.append(_Item([image.to(self.device)], grid, self.settings.image))
        for number, clip in enumerate(videos, start=1):
            video = load_video(clip, sampling=self.settings.sampling, name=f"video {number}")
            frames = [load_image(frame).to(self.device) for frame in video.frames]
            grid = self.video_grid(len(frames), frames[0].shape[1], frames[0].shape[2], name=f"video {number}")
            frames += frames[-1:] * (-len(frames) % self.config.temporal_patch_size)
            items.append(_Item(frames, grid, self.settings.video))
            seconds.append(self.config.temporal_patch_size / video.fps)
        grids = tuple(item.grid for item in items)
        layout = window_layout(grids, self.config)
        pixel_values = torch.empty(
            (len(layout.window_lengths), self.config.window_slots, self.config.qwen2_vl_dim),
            dtype=self.dtype,
            device=self.device,
        )
        self._patchify(self._resized(items), pixel_values)
        return PackedPixels(pixel_values, grids, layout, tuple(seconds))

    def _grid(self, frames: int, height: int, width: int, settings: PixelSettings, name: str) -> Grid:
        try:
            size = smart_resize(height, width, self.config.image_factor, settings.min_pixels, settings.max_pixels)
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from None
        return frames, size[0] // self.config.patch_size, size[1] // self.config.patch_size

    def _resized(self, items: list[_Item]) -> list[_Item]:
        side = self.config.patch_size
        jobs = [(frame, (item.grid[1] * side, item.grid[2] * side)) for item in items for frame in item.frames]
        frames = iter(_resize_all(jobs))
        return [replace(item, frames=[next(frames) for _ in item.frames]) for item in items]

    def _patchify(self, items: list[_Item], pixel_values: Tensor) -> None:
        """Write all windows, in order: frames of one size and kind that follow each other go together."""
        chunk = _CPU_CHUNK if self.device.type == "cpu" else _DEVICE_CHUNK
        window_side = self.config.window_groups * self.config.image_factor
        first = 0
        for (height, width, dtype, length, settings), run in groupby(self._temporal_patches(items), key=_kind):
            mean, std = _mean_and_std(settings, dtype, self.device)
            windows = -(-height // window_side) * -(-width // window_side)
            for patches in _batched([frames for frames, _ in run], max(1, chunk // (3 * height * width))):
                target = pixel_values[first : first + len(patches) * windows]
                first += len(target)
                for time in range(length):
                    same_time = [frames[time] for frames in patches]
                    batch = torch.stack(same_time) if len(same_time) > 1 else same_time[0][None]
                    # An image has one frame for all of the patch's times.
                    self._write_windows(batch, target, slice(None) if length == 1 else slice(time, time + 1), mean, std)

    def _temporal_patches(self, items: list[_Item]) -> Iterator[tuple[list[Tensor], PixelSettings]]:
        """Frames that share a temporal patch: the T of a video, the one of an image."""
        for item in items:
            length = len(item.frames) // item.grid[0]
            for first in range(0, len(item.frames), length):
                yield item.frames[first : first + length], item.settings

    def _write_windows(self, frames: Tensor, target: Tensor, time: slice, mean: Tensor, std: Tensor) -> None:
        """Write frames ``[n, 3, H, W]`` to ``[n * windows, S, D]`` at one time of the patch (all times for an image).

        Full windows, the right border, the lower border and the corner are one strided copy each (in parts if
        large): each has windows of one shape. Patches are gathered as uint8, a quarter of the bytes of floats.
        """
        config = self.config
        merge, patch, side, factor = (
            config.spatial_merge_size,
            config.patch_size,
            config.window_groups,
            config.image_factor,
        )
        count, channels, height, width = frames.shape
        rows, columns = _spans(height // factor, side), _spans(width // factor, side)
        grid = (count, sum(span[1] for span in rows), sum(span[1] for span in columns))
        target = target.view(*grid, config.window_slots, channels, config.temporal_patch_size, patch * patch)
        step = _CPU_CHUNK if frames.device.type == "cpu" else _DEVICE_CHUNK
        for top, down, group_rows in rows:
            for left, across, group_columns in columns:
                y, x = top * side * factor, left * side * factor
                region = frames[:, :, y : y + down * group_rows * factor, x : x + across * group_columns * factor]
                region = region.view(
                    count, channels, down, group_rows, merge, patch, across, group_columns, merge, patch
                )
                region = region.permute(0, 2, 6, 3, 7, 4, 8, 1, 5, 9)  # window, group, patch, channel, row, column
                slots = group_rows * group_columns * merge * merge
                part = max(1, step // (count * across * slots * channels * patch * patch))
                windows = target[:, top : top + down, left : left + across]
                for start in range(0, down, part):
                    piece = region[:, start : start + part]
                    values = piece.reshape(count, -1, across, slots, channels, patch * patch)
                    values = values.to(torch.float32, copy=True).sub_(mean).div_(std)
                    windows[:, start : start + part, :, :slots, :, time] = values.unsqueeze(-2)
                if time.start in (None, 0):
                    windows[:, :, :, slots:] = 0


def _spans(groups: int, side: int) -> list[tuple[int, int, int]]:
    """Cut a row of merge groups into windows: ``(first window, windows, groups in each)``, full ones and the rest."""
    full, rest = divmod(groups, side)
    return [(0, full, side)] * (full > 0) + [(full, 1, rest)] * (rest > 0)


def _kind(patch: tuple[list[Tensor], PixelSettings]) -> tuple[int, int, torch.dtype, int, PixelSettings]:
    frames, settings = patch
    return frames[0].shape[1], frames[0].shape[2], frames[0].dtype, len(frames), settings


def _batched(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


@lru_cache(maxsize=16)
def _mean_and_std(settings: PixelSettings, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[3, 1]`` each; for uint8 the scaling to 0..1 is folded in, as Transformers does, bit for bit."""
    scale = 1.0 / settings.rescale_factor if dtype == torch.uint8 else 1.0
    mean = torch.tensor(settings.image_mean, device=device) * scale
    std = torch.tensor(settings.image_std, device=device) * scale
    return mean.view(-1, 1), std.view(-1, 1)


def _resize_all(jobs: list[tuple[Tensor, tuple[int, int]]]) -> list[Tensor]:
    """Resize each frame ``[3, H, W]`` to its size; a frame that has it already is passed on untouched."""
    results = [frame for frame, _ in jobs]
    pending = [index for index, (frame, size) in enumerate(jobs) if tuple(frame.shape[1:]) != size]
    native = [index for index in pending if results[index].dtype == torch.uint8 and results[index].device.type == "cpu"]
    others = sorted(set(pending) - set(native))
    # PyTorch's uint8 kernel runs on one thread and lets go of the interpreter: threads share the images.
    workers = min(torch.get_num_threads(), len(native))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            resized = list(pool.map(lambda index: _resize_native(*jobs[index]), native))
    else:
        resized = [_resize_native(*jobs[index]) for index in native]
    for index, frame in zip(native, resized, strict=True):
        results[index] = frame
    for _, run in groupby(others, key=lambda index: (results[index].dtype, results[index].shape, jobs[index][1])):
        same = list(run)
        size = jobs[same[0]][1]
        largest = max(results[same[0]].numel(), 3 * size[0] * size[1])
        for part in _batched(same, max(1, _DEVICE_CHUNK // largest)):
            batch = _resize_float(torch.stack([results[index] for index in part]), size)
            for index, frame in zip(part, batch.unbind(0), strict=True):
                results[index] = frame
    return results


def _resize_native(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 ``[3, H, W]`` on the CPU, with the kernel that Transformers reaches through torchvision."""
    # Pixels with their channels side by side (every decoded file) resize twice as fast if the kernel can see that
    # they are, which it does by the stride of the batch dimension that indexing with None gets wrong.
    batch = frame.as_strided((1, *frame.shape), (frame.numel(), *frame.stride()))
    return functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def _resize_float(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[n, 3, H, W]``: floats as they are, uint8 (which CUDA has no kernel for) by way of floats.

    The CPU's kernel resizes rows, rounds to uint8, then resizes columns. Doing the same here keeps nearly every pixel
    equal; resizing both ways before rounding would change one in five by a level.
    """
    if frames.dtype != torch.uint8:
        return functional.interpolate(frames, size, mode="bicubic", antialias=True)
    values = frames.to(torch.float32)
    for step in ((frames.shape[2], size[1]), size):
        if tuple(values.shape[2:]) != step:
            values = functional.interpolate(values, step, mode="bicubic", antialias=True).clamp_(0, 255).round_()
    return values.to(torch.uint8)
