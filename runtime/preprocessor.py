"""Images and videos become the vision graph's input: patches in window order, straight from the pixels.

Resize, normalise and patchify follow Transformers' ``Qwen2VLImageProcessor`` and ``Qwen2VLVideoProcessor``; only
the order of the patches differs, which is that of :func:`qwen2vl_trt.windows.window_layout`.

Letters: T temporal patch size, S slots of a window, W windows, D values of a patch (``qwen2_vl_dim``); H and W after
a 3 are the sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qwen2vl_trt.config import VisionConfig, read_json
from qwen2vl_trt.errors import CheckpointError, LimitError, MediaError
from qwen2vl_trt.windows import Grid, WindowLayout, window_layout

from .images import ImageSource, load_image
from .video import FrameSampling, VideoSource, load_video

MAX_ASPECT_RATIO = 200

_HOST_CHUNK = 1 << 18
"""Values normalised at a time by one thread of the CPU: they stay in its cache on the way to the output."""

_DEVICE_CHUNK = 1 << 28
"""The same on an accelerator: few kernels, and temporary memory that does not grow with the batch."""


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
        nested = read_json(folder / "processor_config.json")
        image = nested.get("image_processor") or read_json(folder / "preprocessor_config.json")
        video = nested.get("video_processor") or read_json(folder / "video_preprocessor_config.json") or image
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
class _Job:
    """One frame to resize and to write."""

    frame: Tensor  # [3, H, W]
    size: tuple[int, int]  # its sides after resizing, in pixels
    first: int  # its first window
    times: slice  # which of a patch's T times it fills: all for an image
    settings: PixelSettings


@dataclass(frozen=True)
class _Region:
    """Windows of one shape in a frame: the full ones, the right border, the lower border, or the corner."""

    top: int
    down: int
    group_rows: int
    left: int
    across: int
    group_columns: int


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
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype} is neither torch.float32 nor torch.bfloat16")
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

    def preprocess(
        self,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        *,
        out: Tensor | None = None,
    ) -> PackedPixels:
        """Resize, normalise and patchify a batch of any mix of sizes.

        Args:
            images: see :func:`~runtime.images.load_image`, which costs nothing for tensors it has loaded.
            videos: see :func:`~runtime.video.load_video`; files are sampled as ``settings.sampling`` says.
            out: flat memory of the output's type and device to write into, if it is large enough. On a CPU most of
                the time goes into the pages of fresh memory, so a caller that is done with a batch passes it on.

        Raises:
            MediaError: what the loaders and :meth:`image_grid` refuse, as ``image 2`` or ``video 1``.
            ValueError: nothing to preprocess.
        """
        if not images and not videos:
            raise ValueError("preprocess() needs at least one image or video")
        items: list[tuple[list[Tensor], Grid, PixelSettings]] = []
        seconds = []
        for number, source in enumerate(images, start=1):
            image = load_image(source, name=f"image {number}")
            grid = self.image_grid(image.shape[1], image.shape[2], name=f"image {number}")
            items.append(([image], grid, self.settings.image))
        for number, clip in enumerate(videos, start=1):
            video = load_video(clip, sampling=self.settings.sampling, name=f"video {number}")
            frames = [load_image(frame) for frame in video.frames]
            grid = self.video_grid(len(frames), frames[0].shape[1], frames[0].shape[2], name=f"video {number}")
            frames += frames[-1:] * (-len(frames) % self.config.temporal_patch_size)
            items.append((frames, grid, self.settings.video))
            seconds.append(self.config.temporal_patch_size / video.fps)
        grids = tuple(grid for _, grid, _ in items)
        layout = window_layout(grids, self.config)
        shape = torch.Size((len(layout.window_lengths), self.config.window_slots, self.config.qwen2_vl_dim))
        if out is None or out.numel() < shape.numel():
            out = torch.empty(shape.numel(), dtype=self.dtype, device=self.device)
        pixel_values = out[: shape.numel()].view(shape)
        write = self._write_on_host if self.device.type == "cpu" else self._write_on_device
        write(list(self._jobs(items)), pixel_values)
        return PackedPixels(pixel_values, grids, layout, tuple(seconds))

    def _grid(self, frames: int, height: int, width: int, settings: PixelSettings, name: str) -> Grid:
        try:
            size = smart_resize(height, width, self.config.image_factor, settings.min_pixels, settings.max_pixels)
        except MediaError as error:
            raise MediaError(f"{name}: {error}") from None
        return frames, size[0] // self.config.patch_size, size[1] // self.config.patch_size

    def _jobs(self, items: list[tuple[list[Tensor], Grid, PixelSettings]]) -> Iterator[_Job]:
        config, first = self.config, 0
        side = config.window_groups * config.spatial_merge_size
        for frames, (patches, rows, columns), settings in items:
            length = len(frames) // patches  # frames of a temporal patch: T, or the one of an image
            for number, frame in enumerate(frames):
                times = slice(None) if length == 1 else slice(number % length, number % length + 1)
                size = (rows * config.patch_size, columns * config.patch_size)
                yield _Job(frame.to(self.device), size, first, times, settings)
                if (number + 1) % length == 0:
                    first += -(-rows // side) * -(-columns // side)

    def _write_on_host(self, jobs: list[_Job], pixel_values: Tensor) -> None:
        """A thread a frame, and nothing within it that would start threads of its own.

        PyTorch's arithmetic splits each operation over all cores and waits for the slowest: beside another busy
        process an image took 30 ms instead of 1. Its uint8 resize and NumPy's loops stay on the thread that calls
        them and let go of the interpreter.
        """
        # NumPy has no bfloat16: its bits are written.
        store = pixel_values.view(torch.int16) if self.dtype == torch.bfloat16 else pixel_values

        def write(job: _Job) -> None:
            frame = _resize_on_host(job.frame, job.size)
            mean, std = (factor.numpy() for factor in _mean_and_std(job.settings, frame.dtype, self.device))
            for region in self._regions(job.size):
                windows, empty = self._target(store, job, region)
                _normalise_on_host(self._source(frame[None], region)[0].numpy(), windows.numpy(), mean, std)
                empty.numpy()[...] = 0

        workers = min(torch.get_num_threads(), len(jobs))
        if workers == 1:
            for job in jobs:
                write(job)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(write, jobs))

    def _write_on_device(self, jobs: list[_Job], pixel_values: Tensor) -> None:
        """Frames of one size and kind together: few kernels, whatever their number."""
        groups: dict[Any, list[_Job]] = {}
        for job in jobs:
            groups.setdefault((job.frame.shape, job.frame.dtype, job.size, job.settings), []).append(job)
        for (shape, dtype, size, settings), same in groups.items():
            mean, std = _mean_and_std(settings, dtype, self.device)
            together = max(1, _DEVICE_CHUNK // max(shape.numel(), shape[0] * size[0] * size[1]))
            for start in range(0, len(same), together):
                part = same[start : start + together]
                frames = _resize_on_device(torch.stack([job.frame for job in part]), size)
                for region in self._regions(size):
                    values = self._source(frames, region).to(torch.float32, memory_format=torch.contiguous_format)
                    values = values.flatten(3, 6).flatten(5, 6)  # [n, down, across, slots, channels, pixels]
                    values = (values - mean).div_(std).unsqueeze(-2)
                    for job, patches in zip(part, values.unbind(0), strict=True):
                        windows, empty = self._target(pixel_values, job, region)
                        windows.copy_(patches)
                        empty.zero_()

    def _regions(self, size: tuple[int, int]) -> list[_Region]:
        """Up to four: a strided copy of each fills all windows."""
        rows, columns = (_spans(side // self.config.image_factor, self.config.window_groups) for side in size)
        return [_Region(*vertical, *horizontal) for vertical in rows for horizontal in columns]

    def _source(self, frames: Tensor, region: _Region) -> Tensor:
        """``[n, down, across, group rows, group columns, merge, merge, 3, patch, patch]``, a view of the frames."""
        config = self.config
        merge, patch, factor = config.spatial_merge_size, config.patch_size, config.image_factor
        y, x = (start * config.window_groups * factor for start in (region.top, region.left))
        height, width = region.down * region.group_rows * factor, region.across * region.group_columns * factor
        cut = frames[:, :, y : y + height, x : x + width]
        cut = cut.unflatten(3, (region.across, region.group_columns, merge, patch))
        cut = cut.unflatten(2, (region.down, region.group_rows, merge, patch))
        return cut.permute(0, 2, 6, 3, 7, 4, 8, 1, 5, 9)

    def _target(self, pixel_values: Tensor, job: _Job, region: _Region) -> tuple[Tensor, Tensor]:
        """``[down, across, filled slots, 3, times, patch pixels]`` and what is empty behind, views of the output."""
        config = self.config
        rows, columns = (-(-side // (config.image_factor * config.window_groups)) for side in job.size)
        windows = pixel_values[job.first : job.first + rows * columns].unflatten(0, (rows, columns))
        windows = windows[region.top : region.top + region.down, region.left : region.left + region.across]
        slots = region.group_rows * region.group_columns * config.merge_unit
        patches = windows.unflatten(-1, (config.in_chans, config.temporal_patch_size, config.patch_size**2))
        return patches[:, :, :slots, :, job.times], windows[:, :, slots:]


def _spans(groups: int, side: int) -> list[tuple[int, int, int]]:
    """Cut a row of merge groups into windows: ``(first window, windows, groups in each)``, full ones and the rest."""
    full, rest = divmod(groups, side)
    return [(0, full, side)] * (full > 0) + [(full, 1, rest)] * (rest > 0)


@lru_cache(maxsize=16)
def _mean_and_std(settings: PixelSettings, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[3, 1]`` each; for uint8 the scaling to 0..1 is folded in, as Transformers does, bit for bit."""
    scale = 1.0 / settings.rescale_factor if dtype == torch.uint8 else 1.0
    mean = torch.tensor(settings.image_mean, device=device) * scale
    std = torch.tensor(settings.image_std, device=device) * scale
    return mean.view(-1, 1), std.view(-1, 1)


def _normalise_on_host(source: np.ndarray, target: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Copy patches ``[down, across, ..., 3, patch, patch]`` into windows ``[down, across, slots, 3, times, pixels]``.

    Bit for bit what PyTorch computes; patches are gathered before they become floats of four times the size.
    """
    rows = max(1, _HOST_CHUNK // source[0].size)
    gathered = np.empty((min(rows, len(source)), *source.shape[1:]), source.dtype)
    floats = np.empty(gathered.shape, np.float32)
    for start in range(0, len(source), rows):
        piece = source[start : start + rows]
        count = len(piece)
        np.copyto(gathered[:count], piece)
        np.copyto(floats[:count], gathered[:count])
        values = floats[:count].reshape(count, *target.shape[1:4], target.shape[5])
        values -= mean
        values /= std
        if target.dtype == np.int16:
            _round_to_bfloat16(values)
        target[start : start + count] = (values.view(np.int32) if target.dtype == np.int16 else values)[..., None, :]


def _round_to_bfloat16(values: np.ndarray) -> None:
    """Replace each float32 by the 16 bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    bits >>= 16


def _resize_on_host(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[3, H, W]``, uint8 with the kernel that Transformers reaches through torchvision; none if it fits."""
    if tuple(frame.shape[1:]) == size:
        return frame
    # Pixels with their channels side by side (every decoded file) resize twice as fast if the kernel can see that
    # they are, which it does by the stride of the batch dimension that indexing with None gets wrong.
    batch = frame.as_strided((1, *frame.shape), (frame.numel(), *frame.stride()))
    return functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def _resize_on_device(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``[n, 3, H, W]``: floats as they are, uint8 (which CUDA has no kernel for) by way of floats.

    So does Transformers on CUDA. The CPU's kernel rounds between rows and columns, which moves one value in five by a
    level; rounding here as well would bring the mean down, but a few values would then differ by two.
    """
    if tuple(frames.shape[2:]) == size:
        return frames
    resized = functional.interpolate(frames.to(torch.float32), size, mode="bicubic", antialias=True)
    return resized.clamp_(0, 255).round_().to(torch.uint8) if frames.dtype == torch.uint8 else resized
