"""Images of any kind to one RGB tensor ``[3, H, W]``.

Letters: B batch, C channels (1, 3 or 4), H and W the sides in pixels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from qwen2vl_trt.errors import MediaError

from .files import MAX_FILE_BYTES, labelled, opened, read_whole, too_large
from .image_formats import decode_errors, load_pixels, open_image

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A path, the bytes of an image file, a PIL image, numpy uint8 ``[H, W, C]`` or ``[H, W]``, torch ``[C, H, W]``."""

_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_AS_I = ("PNG", "PPM")
_BLOCK = 1 << 18
"""Pixels converted at a time, so that a whole image is never wider than 8 bits."""

_OUTPUT_BYTES = 3
"""Of a pixel that :func:`load_image` returns."""

_DECODER_BYTES = {"WEBP": 12, "JPEG2000": 16, "AVIF": 6, "HEIF": 6, "TIFF": 7}
"""Measured memory of a decoder for each pixel, besides Pillow's; 0 for those that decode row by row."""

_PROGRESSIVE_BYTES = 6
"""Likewise of a progressive JPEG, which keeps all coefficients until its first pixel."""

_pillow_lock = threading.Lock()  # an open image reads its file lazily, and threads may share it


@dataclass(frozen=True)
class ImageLimits:
    """Maxima of what is read.

    Attributes:
        pixels: of a file or a Pillow image, checked before it is decoded.
        nbytes: of a file.
    """

    pixels: int = 100_000_000
    nbytes: int = MAX_FILE_BYTES


def load_image(
    source: ImageSource, *, name: str | None = None, limits: ImageLimits | None = None, group_max: float = 0
) -> Tensor:
    """Read one image; of a file with several frames, the first.

    Files are JPEG (with MPO), PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF (Pillow 11.3) and HEIC (pillow-heif).
    EXIF orientation is applied. Transparency is composited over white, as in qwen-vl-utils and Transformers' video
    processor, since what it hides is usually black. 16-bit greyscale is scaled to 8 bits.

    Args:
        source: see :data:`ImageSource`. A torch tensor is uint8, or float in 0..1 or 0..255.
        name: for error messages, such as ``"image 3"``; a path is always named.
        limits: of files, ``ImageLimits()`` by default.
        group_max: of a float tensor, the maximum of all that share its range, such as frames of a video.

    Returns:
        ``[3, H, W]`` on the tensor's device (else CPU), a view of the source where possible; uint8, or of a float
        tensor float32 in 0..1, see :func:`rgb`. Reading a float tensor's range waits for its GPU.

    Raises:
        MediaError: no such file, not an image, truncated, empty, a side of 0 pixels, over the limits, another dtype or
            shape, or floats outside of both ranges.
    """
    label, limits = labelled(source, name), limits or ImageLimits()
    contents = file_bytes(source, name=name, limits=limits)
    if contents is not None:
        with decode_errors(label), open_image(BytesIO(contents), label) as image:
            check_pixels(image.width, image.height, label, limits)
            load_pixels(image)
            return _from_pil(image, label)
    if isinstance(source, Image.Image):
        check_pixels(source.width, source.height, label, limits)
        with _pillow_lock, decode_errors(label):
            source.load()
            return _from_pil(source, label)
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim > 3:
        raise MediaError(f"{label}: shape {list(source.shape)} holds more than one image")
    if isinstance(source, np.ndarray):
        return rgb(channels_first(source, label), label)
    if isinstance(source, Tensor):
        return rgb(source[None] if source.ndim == 2 else source, label, group_max)
    raise MediaError(
        f"{label}: {type(source).__name__} is no image; give a path, bytes, a PIL image, a numpy array or a tensor"
    )


def split_batch(images: Tensor) -> list[list[Tensor]]:
    """Split ``[B, n_cameras, 3, H, W]`` into the images of each sample, as views. Raises as :func:`load_image`."""
    if not isinstance(images, Tensor):
        raise MediaError(f"image batch: a {type(images).__name__} is no tensor; give one, [B, n_cameras, 3, H, W]")
    if images.ndim != 5:
        raise MediaError(f"image batch: shape {list(images.shape)} is not [B, n_cameras, 3, H, W]")
    if not images.shape[0] * images.shape[1]:
        raise MediaError(f"image batch: shape {list(images.shape)} holds no image")
    return [list(sample.unbind(0)) for sample in rgb(images, "image batch").unbind(0)]


def channels_first(array: np.ndarray, label: str) -> Tensor:
    """View a numpy array ``[H, W]`` or ``[..., H, W, C]`` as ``[..., C, H, W]``; copies only what torch cannot view."""
    if array.dtype != np.uint8:
        raise MediaError(f"{label}: numpy dtype {array.dtype} is not uint8")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim < 3 or array.shape[-1] not in (1, 3, 4):
        raise MediaError(f"{label}: numpy shape {list(array.shape)} is not [H, W] or [H, W, C] with C 1, 3 or 4")
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array).movedim(-1, -3)


def rgb(pixels: Tensor, label: str, group_max: float = 0) -> Tensor:
    """Check ``[..., C, H, W]`` and return ``[..., 3, H, W]``, uint8 or float32 in 0..1.

    Floats with a maximum of up to 1 are taken as 0..1 (Transformers' ``do_rescale=False``), from 2 to 255 as 0..255
    (its default, and qwen-vl-utils' videos). Between 1 and 2 they are refused: a resize may have overshot 0..1.
    ``group_max`` counts too: a dark frame of a video in 0..255 may have no value above 1.
    """
    if pixels.ndim < 3 or pixels.shape[-3] not in (1, 3, 4):
        raise MediaError(f"{label}: tensor shape {list(pixels.shape)} is not [C, H, W] with C 1, 3 or 4")
    channels, height, width = pixels.shape[-3:]
    if not height * width:
        raise MediaError(f"{label}: {width}x{height} has no pixels")
    pixels = pixels.detach()
    if pixels.is_floating_point():
        pixels = pixels.to(torch.float32)
        low, high = torch.stack(torch.aminmax(pixels)).tolist()
        shared = max(high, group_max)
        if not (low >= 0 and high <= 255 and (high <= 1 or shared >= 2)):  # true for NaN too
            raise MediaError(
                f"{label}: float values from {low:g} to {high:g} are neither within 0..1 nor within 0..255; clamp or"
                " scale them"
            )
        if shared > 1:
            pixels = pixels / 255
    elif pixels.dtype != torch.uint8:
        raise MediaError(f"{label}: dtype {pixels.dtype} is not torch.uint8 or a float in 0..1 or 0..255")
    if channels == 1:
        return pixels.expand(*pixels.shape[:-3], 3, height, width)
    return over_white(pixels) if channels == 4 else pixels


def over_white(rgba: Tensor) -> Tensor:
    """Composite ``[..., 4, H, W]`` over white to ``[..., 3, H, W]``; uint8 is rounded to the nearest."""
    result = torch.empty_like(rgba[..., :3, :, :])
    _compose(rgba, result)
    return result


def _compose(rgba: Tensor, result: Tensor) -> None:
    if rgba.ndim > 3:
        for image, target in zip(rgba, result):
            _compose(image, target)
        return
    # On a CPU as many as fit its cache and stay on this thread; on a GPU launches cost more.
    rows = max(1, (1 << 14 if rgba.device.type == "cpu" else 1 << 22) // rgba.shape[-1])
    for band, target in zip(rgba.split(rows, 1), result.split(rows, 1)):
        alpha = band[3] if rgba.is_floating_point() else band[3].to(torch.int32)
        white = 1 - alpha if rgba.is_floating_point() else 255 * (255 - alpha) + 127
        for channel in range(3):  # one by one: interleaved in memory, their loops would have three steps
            total = band[channel] * alpha + white
            if not rgba.is_floating_point():
                total = (total + 1 + (total >> 8)) >> 8  # total // 255, for all up to 65534
            target[channel] = total


def file_bytes(source: ImageSource, *, name: str | None = None, limits: ImageLimits | None = None) -> bytes | None:
    """Contents of an image file, given its path or bytes, else None. Raises as :func:`load_image`."""
    label, max_bytes = labelled(source, name), (limits or ImageLimits()).nbytes
    if isinstance(source, (str, Path)):
        with opened(source, label) as file:
            return read_whole(file, label, max_bytes)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        return None
    if not len(source):
        raise MediaError(f"{label}: empty (0 bytes)")
    if len(source) > max_bytes:
        raise too_large(label, max_bytes)
    return bytes(source)


def is_plain_jpeg(data: bytes, limits: ImageLimits) -> bool:
    """Whether this is a JPEG file that all decoders read alike: complete, grey or RGB, within the limits."""
    if not (data.startswith(b"\xff\xd8\xff") and data.rstrip(b"\0").endswith(b"\xff\xd9")):
        return False
    try:
        with open_image(BytesIO(data), "image") as image:
            check_pixels(image.width, image.height, "image", limits)
            return image.format == "JPEG" and image.mode in ("L", "RGB")
    except Exception:  # load_image reports it
        return False


def decoding_bytes(source: ImageSource) -> int:
    """Most memory that loading an image takes, by its header; 0 if :func:`load_image` will fail."""
    if isinstance(source, (np.ndarray, Tensor)):
        return source.nbytes
    if isinstance(source, Image.Image):
        if isinstance(source, ImageFile.ImageFile) and source.fp is not None:  # not decoded yet
            return _decoding_bytes(source)
        return _OUTPUT_BYTES * source.width * source.height
    try:
        if isinstance(source, (str, Path)):
            with opened(source, "image") as file, open_image(file, "image") as image:
                return os.fstat(file.fileno()).st_size + _decoding_bytes(image)
        with open_image(BytesIO(source), "image") as image:
            return len(source) + _decoding_bytes(image)
    except Exception:  # as above
        return 0


def _decoding_bytes(image: ImageFile.ImageFile) -> int:
    stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    decoder = _PROGRESSIVE_BYTES if image.info.get("progressive") else _DECODER_BYTES.get(image.format or "", 0)
    return image.width * image.height * (stored + max(_OUTPUT_BYTES, decoder))


def check_pixels(width: int, height: int, label: str, limits: ImageLimits) -> None:
    """Raises MediaError for an image without pixels or above the limit, before it is decoded."""
    pixels = width * height
    if min(width, height) < 1:
        raise MediaError(f"{label}: {width}x{height} has no pixels")
    if pixels > limits.pixels:
        raise MediaError(
            f"{label}: {width}x{height} is {pixels:,} pixels; at most {limits.pixels:,} are decoded"
            " (--image-pixel-limit). Shrink it, or raise the limit."
        )


def _from_pil(image: Image.Image, label: str) -> Tensor:
    """``[3, H, W]`` of a loaded image: upright, 8 bits, over white."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_AS_I)
    if image.mode in ("I", "F") and not sixteen:
        raise MediaError(
            f"{label}: mode {image.mode!r} has 32 bits without a known range; convert it to 8 or 16 bits first"
        )
    orientation = _orientation(image)
    height, width = (image.width, image.height) if orientation >= 5 else (image.height, image.width)
    pixels = np.empty((height, width, 1 if sixteen else 3), np.uint8)
    stored = _as_stored(pixels, orientation)
    transparent = image.has_transparency_data
    for left, top, right, bottom in _blocks(image.width, image.height):
        # Not crop: up to Pillow 12 it looks at Pillow's own limit.
        block = image.resize((right - left, bottom - top), Image.Resampling.NEAREST, (left, top, right, bottom))
        if sixteen:
            values = np.asarray(block).astype(np.uint32)
            eight = ((values + 128) // 257)[..., None]  # 65535 becomes 255, to the nearest
        elif transparent:
            rgba = torch.from_numpy(np.array(block.convert("RGBA")))
            eight = over_white(rgba.movedim(-1, 0)).movedim(0, -1).numpy()
        else:
            eight = np.asarray(block.convert("RGB"))
        stored[top:bottom, left:right] = eight
    return rgb(channels_first(pixels, label), label)


def _blocks(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    columns = min(width, _BLOCK)
    rows = max(1, _BLOCK // columns)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 if there is none or it is invalid, as in every viewer."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of ``[H, W, C]`` in the file's orientation."""
    if orientation >= 5:
        upright = upright.swapaxes(0, 1)
    if orientation in (3, 4, 6, 7):
        upright = upright[::-1]
    return upright[:, ::-1] if orientation in (2, 3, 7, 8) else upright
