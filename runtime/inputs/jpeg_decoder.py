"""JPEG files decoded on the GPU by nvImageCodec, an optional package; all other images as ever, by Pillow.

A GPU's decoder does not round as libjpeg does (inverse cosine transform, chroma upsampling), so its pixels differ from
Pillow's by a level or so, and answers may follow: hence an option. torchvision's decoder for CUDA, which would do too,
is deprecated since 0.29 and leaves the EXIF orientation to the caller.

Against nvImageCodec 0.9 only the names and signatures are checked: no decode has run on a GPU yet.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen2vl_trt.errors import MediaError, MissingDependencyError, pip_install

from .files import labelled
from .images import ImageLimits, ImageSource, file_bytes, is_plain_jpeg, load_image


def check_gpu_decoding(device: torch.device | str) -> None:
    """See whether JPEG files can be decoded on a device.

    Raises:
        MediaError: it is no GPU.
        MissingDependencyError: nvImageCodec is not installed.
    """
    if torch.device(device).type != "cuda":
        raise MediaError(f'decode="gpu" (--decode gpu) needs a GPU, and the engines run on {device}; leave it at "cpu"')
    _import_codec()


def _import_codec() -> Any:
    try:
        return importlib.import_module("nvidia.nvimgcodec")
    except ImportError as error:
        raise MissingDependencyError(
            f'decode="gpu" (--decode gpu) needs nvImageCodec ({error}): {pip_install("gpu-decode")},'
            ' or decode on the CPU (decode="cpu")'
        ) from None


class JpegDecoder:
    """Loads images whose JPEG files it decodes on a device; any thread may, one at a time decodes.

    Raises:
        MissingDependencyError: nvImageCodec is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._codec = _import_codec()
        self._device = device
        self._one_at_a_time = threading.Lock()
        # Chroma is interpolated, as libjpeg does by default, not repeated.
        number = -1 if device.index is None else device.index  # -1 is the current one
        self._decoder = self._codec.Decoder(device_id=number, options=":fancy_upsampling=1")

    def load(
        self, sources: Sequence[ImageSource], names: Sequence[str], limits: ImageLimits | None = None
    ) -> list[Tensor]:
        """:func:`~qwen2vl_trt.runtime.inputs.images.load_image` for many, all their plain JPEG files decoded in one
        call.

        A file that the decoder gives up is left to Pillow, which decodes it or says what is wrong with it.
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
        with self._one_at_a_time:
            images = self._decoder.decode(list(files.values()), params=params, cuda_stream=stream)
        return {
            i: torch.from_dlpack(image).permute(2, 0, 1)  # [H, W, 3] in memory
            for i, image in zip(files, images, strict=True)
            if image is not None
        }
