"""Images and videos to the vision graph's input: patches in the order of :func:`qwen2vl_trt.windows.window_layout`.

Values are those of Transformers' ``Qwen2VLImageProcessor`` and ``Qwen2VLVideoProcessor``. The CPU uses
:mod:`~qwen2vl_trt.runtime.preprocessing.frames`, CUDA :mod:`~qwen2vl_trt.runtime.preprocessing.triton_writer` or,
without Triton, :mod:`~qwen2vl_trt.runtime.preprocessing.torch_writer`. From 8-bit pixels all three give the same
patches, bit for bit.

Letters: S slots of a window, W windows, D values of a patch (``qwen2_vl_dim``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import EngineError
from qwen2vl_trt.media_options import ImageOptions, VideoOptions
from qwen2vl_trt.windows import Grid, WindowLayout, window_layout

from ..inputs.clips import VideoLimits
from ..inputs.files import labelled
from ..inputs.images import ImageLimits, ImageSource, load_image
from ..inputs.jpeg_decoder import JpegDecoder, check_gpu_decoding
from ..inputs.video import VideoSource, load_video
from .frames import CpuWriter, Frame, FrameWriter, window_rows_and_columns
from .settings import PreprocessorSettings
from .sizes import Medium, SizeRules
from .staging import DEFAULT_LIMIT, Staging
from .torch_writer import TorchWriter
from .triton_writer import TritonWriter, triton_is_installed

_log = logging.getLogger(__name__)

Kernels = Literal["auto", "triton", "torch"]
"""Of a GPU: Triton's, PyTorch's operations, or (``auto``) Triton's if installed."""

Decode = Literal["cpu", "gpu"]
"""Where JPEG files are decoded."""


@dataclass(frozen=True)
class PackedPixels:
    """One batch for the vision graph: all images, then all videos.

    Attributes:
        pixel_values: ``[W, S, D]``; empty slots are zero.
        grids: ``(t, h, w)`` of each image and video.
        layout: index tensors.
        second_per_grid_ts: seconds between temporal patches of each video.
    """

    pixel_values: Tensor
    grids: tuple[Grid, ...]
    layout: WindowLayout
    second_per_grid_ts: tuple[float, ...] = ()


class Preprocessor:
    """Turns images and videos into :class:`PackedPixels`; not thread-safe.

    On CUDA the work is queued on the current stream, without a wait. Host images are copied as 8 bits through pinned
    buffers; images on the device are read in place, with any strides.

    Args:
        config: the checkpoint's vision tower.
        settings: limits and normalisation, see :meth:`PreprocessorSettings.from_folder`.
        device: of the work and the output.
        dtype: of the output, torch.float32 or torch.bfloat16 (the FP32 values, rounded).
        kernels: of a GPU.
        decode: ``"gpu"`` decodes JPEG files by nvImageCodec, whose pixels differ from Pillow's by about a level.
        image_limits: of image files, ``ImageLimits()`` by default.
        video_limits: of videos, ``VideoLimits()`` by default.
        memory_limit: bytes of pixels that a GPU resizes at a time, and of each of two pinned and two device buffers.

    Raises:
        MissingDependencyError: Triton or nvImageCodec is requested and not installed.
        EngineError: Triton is requested and cannot compile here.
        MediaError: ``decode="gpu"`` without a GPU.
    """

    def __init__(
        self,
        config: VisionConfig,
        settings: PreprocessorSettings | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        kernels: Kernels = "auto",
        decode: Decode = "cpu",
        image_limits: ImageLimits | None = None,
        video_limits: VideoLimits | None = None,
        memory_limit: int = DEFAULT_LIMIT,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype} is neither torch.float32 nor torch.bfloat16")
        self.config = config
        self.settings = settings or PreprocessorSettings()
        self.sizes = SizeRules(config, self.settings)
        self.device = torch.device(device)
        self.dtype = dtype
        self.image_limits, self.video_limits = image_limits or ImageLimits(), video_limits or VideoLimits()
        if decode == "gpu":
            check_gpu_decoding(self.device)
        self._decoder = JpegDecoder(self.device) if decode == "gpu" else None
        self._writer = self._choose_writer(kernels, memory_limit)

    def load_images(self, sources: Sequence[ImageSource], names: Sequence[str]) -> list[Tensor]:
        """Decode images, see :func:`~qwen2vl_trt.runtime.inputs.images.load_image`; ``names`` are for errors."""
        if self._decoder is not None:
            return self._decoder.load(sources, names, self.image_limits)
        return [
            load_image(source, name=name, limits=self.image_limits) for source, name in zip(sources, names, strict=True)
        ]

    def load_image(
        self, source: ImageSource, name: str, options: ImageOptions = ImageOptions(), contents: bytes | None = None
    ) -> Medium:
        """Decode an image and choose its size.

        Args:
            source: see :data:`~qwen2vl_trt.runtime.inputs.images.ImageSource`.
            name: for error messages.
            options: of its size.
            contents: of the file, if it has been read already.

        Raises:
            MediaError: it cannot be read.
            LimitError: it does not fit the engine, and sizes are strict.
        """
        label = labelled(source, name)
        (pixels,) = self.load_images([source], [name]) if contents is None else self.load_images([contents], [label])
        return self._image(pixels, label, options)

    def load_video(self, source: VideoSource, name: str, options: VideoOptions = VideoOptions()) -> Medium:
        """Decode and sample a video and choose its frames' size; otherwise as :meth:`load_image`."""
        video = load_video(
            source,
            options,
            sampling=self.settings.sampling,
            name=name,
            limits=self.video_limits,
            image_limits=self.image_limits,
        )
        height, width = video.source_size
        label = labelled(source, name)
        size = self.sizes.video(len(video.frames), height, width, video.fps, name=label, options=options)
        return Medium(size, video.frames)

    def preprocess(
        self, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = (), *, out: Tensor | None = None
    ) -> PackedPixels:
        """Load and :meth:`pack` a batch; errors name ``image 2`` or ``video 1``. Raises as these methods do."""
        names = [f"image {number}" for number in range(1, len(images) + 1)]
        media = [self._image(pixels, name) for pixels, name in zip(self.load_images(images, names), names)]
        media += [self.load_video(video, f"video {number}") for number, video in enumerate(videos, start=1)]
        return self.pack(media, out)

    def pack(self, media: Sequence[Medium], out: Tensor | None = None) -> PackedPixels:
        """Resize, normalise and patchify.

        Args:
            media: with their pixels.
            out: flat memory of the output's type and device to reuse if it is large enough. On a CPU, page faults of
                fresh memory take most of the time.

        Raises:
            ValueError: nothing to preprocess.
        """
        if not media:
            raise ValueError("preprocess() needs at least one image or video")
        grids = tuple(medium.size.grid for medium in media)
        layout = window_layout(grids, self.config)
        shape = torch.Size((len(layout.window_lengths), self.config.window_slots, self.config.qwen2_vl_dim))
        if out is None or out.numel() < shape.numel():
            out = torch.empty(shape.numel(), dtype=self.dtype, device=self.device)
        pixel_values = out[: shape.numel()].view(shape)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._writer.write(list(self._frames(media)), pixel_values)
        seconds = tuple(medium.size.second_per_grid for medium in media if medium.is_video)
        return PackedPixels(pixel_values, grids, layout, seconds)

    def _image(self, pixels: Tensor, label: str, options: ImageOptions = ImageOptions()) -> Medium:
        height, width = pixels.shape[1:]
        return Medium(self.sizes.image(height, width, name=label, options=options), (pixels,))

    def _choose_writer(self, kernels: Kernels, memory_limit: int) -> FrameWriter:
        if self.device.type == "cpu":
            return CpuWriter(self.config)
        staging = Staging(self.device, memory_limit)
        plain = TorchWriter(self.config, staging)
        if kernels == "torch":
            return plain
        if kernels == "auto" and not triton_is_installed():
            _log.warning("Triton is not installed; PyTorch preprocesses instead, in many kernels")
            return plain
        fused = TritonWriter(self.config, staging, floats=plain)
        try:
            with torch.cuda.device(self.device):
                fused.warm_up(self.device, self.dtype)
        except Exception as error:  # Triton and the compilers that it calls raise nearly anything
            reason = str(error).strip().split("\n")[0]
            if kernels == "triton":
                raise EngineError(
                    f'kernels="triton": Triton cannot compile for this GPU: {reason}; leave it at "auto"'
                ) from error
            _log.warning(
                "Triton cannot compile for this GPU (%s); PyTorch preprocesses instead, in many kernels",
                reason,
            )
            return plain
        return fused

    def _frames(self, media: Sequence[Medium]) -> Iterator[Frame]:
        first = 0
        for medium in media:
            patches, rows, columns = medium.size.grid
            settings = self.settings.video if medium.is_video else self.settings.image
            length = self.config.temporal_patch_size if medium.is_video else 1  # frames of a temporal patch
            frames = [*medium.frames, *[medium.frames[-1]] * (patches * length - len(medium.frames))]
            size = (rows * self.config.patch_size, columns * self.config.patch_size)
            down, across = window_rows_and_columns(size, self.config)
            for number, frame in enumerate(frames):
                time = number % length
                yield Frame(frame, size, first, slice(None) if length == 1 else slice(time, time + 1), settings)
                if time == length - 1:
                    first += down * across
