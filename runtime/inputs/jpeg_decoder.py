"""JPEG files decoded on the GPU by nvImageCodec, an optional package; all other images by Pillow.

This is an option because a GPU's decoder rounds differently from libjpeg (inverse cosine transform, chroma upsampling):
pixels differ from Pillow's by about a level. torchvision's CUDA decoder is deprecated since 0.29 and ignores the EXIF
orientation.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.errors import MediaError, MissingDependencyError

from .files import labelled
from .images import ImageLimits, ImageSource, file_bytes, is_plain_jpeg, load_image


def check_gpu_decoding(device: torch.device | str) -> None:
    """Raises MediaError if the device is no GPU, and MissingDependencyError without nvImageCodec."""
    if torch.device(device).type != "cuda":
        raise MediaError(f'decode="gpu" (--decode gpu) needs a GPU, and the engines run on {device}; leave it at "cpu"')
    _import_codec()


def _import_codec() -> Any:
    try:
        return importlib.import_module("nvidia.nvimgcodec")
    except ImportError as error:
        raise MissingDependencyError(
            f'decode="gpu" (--decode gpu) needs nvImageCodec ({error}); pip install "qwen2vl-trt[gpu-decode]",'
            ' or decode on the CPU (decode="cpu")'
        ) from None


class JpegDecoder:
    """Loads images, decoding JPEG files on a device. Thread-safe; raises MissingDependencyError without its package."""

    def __init__(self, device: torch.device) -> None:
        self._codec = _import_codec()
        self._device = device
        self._lock = threading.Lock()
        # Chroma is interpolated, as libjpeg does by default, not repeated.
        number = -1 if device.index is None else device.index  # -1 is the current one
        self._decoder = self._codec.Decoder(device_id=number, options=":fancy_upsampling=1")

    def load(
        self, sources: Sequence[ImageSource], names: Sequence[str], limits: ImageLimits | None = None
    ) -> list[Tensor]:
        """:func:`~qwen2vl_trt.runtime.inputs.images.load_image` for many, with one decoder call for plain JPEG files.

        Pillow decodes the files that the decoder rejects, or reports what is wrong with them.
        """
        limits = limits or ImageLimits()
        labels = [labelled(source, name) for source, name in zip(sources, names, strict=True)]
        read = [file_bytes(source, name=name, limits=limits) for source, name in zip(sources, names)]
        decoded = self._decode({i: data for i, data in enumerate(read) if data and is_plain_jpeg(data, limits)})
        return [
            decoded[i] if i in decoded else load_image(source if data is None else data, name=label, limits=limits)
            for i, (source, data, label) in enumerate(zip(sources, read, labels))
        ]

    def _decode(self, files: dict[int, bytes]) -> dict[int, Tensor]:
        if not files:
            return {}
        codec = self._codec
        params = codec.DecodeParams(apply_exif_orientation=True, color_spec=codec.ColorSpec.SRGB)
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        with self._lock:
            images = self._decoder.decode(list(files.values()), params=params, cuda_stream=stream)
        return {
            i: torch.from_dlpack(image).permute(2, 0, 1)  # [H, W, 3] in memory
            for i, image in zip(files, images, strict=True)
            if image is not None
        }
