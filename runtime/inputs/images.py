"""Any image a user may hold becomes one RGB tensor ``[3, H, W]``.

Letters: B batch, C channels (1, 3 or 4), H and W the sides in pixels (in this module W is a width, not windows).
"""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from qwen2vl_trt.errors import MediaError

ImageSource = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A path, the bytes of an image file, a PIL image, numpy uint8 ``[H, W, C]`` or ``[H, W]``, torch ``[C, H, W]``."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_AS_I = ("PNG", "PPM")
_open_lock = threading.Lock()
_shared_lock = threading.Lock()  # an open image reads its file when its pixels are wanted, whoever else wants them


def load_image(source: ImageSource, *, name: str | None = None) -> Tensor:
    """Read one image; the first frame where the file has several.

    EXIF orientation is applied. Transparency is composited over white, as qwen-vl-utils and Transformers' video
    processor do: people see a logo or a plot on a white page, and dropping alpha would show the black that usually
    lies under it. 16-bit greyscale is scaled to 8 bits, not clipped.

    Args:
        source: see :data:`ImageSource`. A torch tensor is uint8, or float in 0..1 or 0..255.
        name: what error messages call it, such as ``"image 3"``; a path is always named.

    Returns:
        ``[3, H, W]`` on the tensor's own device (CPU for everything else), a view of the source where possible.
        uint8; float32 for a float tensor, which is kept as it is so that the pixels equal those of Transformers'
        processor with ``do_rescale=False`` (the call that has a meaning for 0..1), resize included. The range of a
        float tensor is read, which waits for a GPU that it is on; that of uint8 needs no reading.

    Raises:
        MediaError: no such file, not an image, truncated, empty, a side of 0 pixels, over Pillow's limit of pixels,
            another dtype or shape, or floats outside of both ranges.
    """
    if isinstance(source, (str, Path)):
        return _from_path(source, f"{name} ({source})" if name else str(source))
    label = name or "image"
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise MediaError(f"{label}: empty (0 bytes)")
        return _decode(BytesIO(source), label)
    if isinstance(source, Image.Image):
        with _shared_lock:
            return _from_pil(source, label)
    if isinstance(source, (np.ndarray, Tensor)) and source.ndim > 3:
        raise MediaError(f"{label}: shape {list(source.shape)} holds more than one image")
    if isinstance(source, np.ndarray):
        return rgb(channels_first(source, label), label)
    if isinstance(source, Tensor):
        return rgb(source[None] if source.ndim == 2 else source, label)
    raise MediaError(
        f"{label}: {type(source).__name__} is no image; give a path, bytes, a PIL image, a numpy array or a tensor"
    )


def split_batch(images: Tensor) -> list[list[Tensor]]:
    """Split the batch form ``[B, n_cameras, 3, H, W]`` into the images of each sample, as views.

    Raises:
        MediaError: another number of dimensions, no image, or what :func:`load_image` refuses.
    """
    if images.ndim != 5:
        raise MediaError(f"image batch: shape {list(images.shape)} is not [B, n_cameras, 3, H, W]")
    if not images.shape[0] * images.shape[1]:
        raise MediaError(f"image batch: shape {list(images.shape)} holds no image")
    return [list(sample.unbind(0)) for sample in rgb(images, "image batch").unbind(0)]


def channels_first(array: np.ndarray, label: str) -> Tensor:
    """View a numpy array ``[H, W]`` or ``[..., H, W, C]`` as ``[..., C, H, W]``; it is copied only if it must be."""
    if array.dtype != np.uint8:
        raise MediaError(f"{label}: numpy dtype {array.dtype} is not uint8")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim < 3 or array.shape[-1] not in (1, 3, 4):
        raise MediaError(f"{label}: numpy shape {list(array.shape)} is not [H, W] or [H, W, C] with C 1, 3 or 4")
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch cannot view these
    return torch.from_numpy(array).movedim(-1, -3)


def rgb(pixels: Tensor, label: str) -> Tensor:
    """Check ``[..., C, H, W]`` and give ``[..., 3, H, W]``, uint8 or float32 in 0..1.

    Floats up to 1 are 0..1, what Transformers' ``do_rescale=False`` takes. With a maximum from 2 to 255 they are
    0..255, what its default takes and qwen-vl-utils makes of a video, and are divided by 255. A maximum between 1 and 2
    is refused: it may be 0..1 that a resize has let out of its range.
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
        if not (low >= 0 and (high <= 1 or 2 <= high <= 255)):  # true for NaN too
            raise MediaError(
                f"{label}: float values from {low:g} to {high:g} are neither within 0..1 nor within 0..255; clamp or"
                " scale them"
            )
        if high > 1:
            pixels = pixels / 255
    elif pixels.dtype != torch.uint8:
        raise MediaError(f"{label}: dtype {pixels.dtype} is not torch.uint8 or a float in 0..1")
    if channels == 1:
        return pixels.expand(*pixels.shape[:-3], 3, height, width)
    return _over_white(pixels) if channels == 4 else pixels


def _over_white(rgba: Tensor) -> Tensor:
    colour, alpha = rgba[..., :3, :, :], rgba[..., 3:, :, :]
    if rgba.is_floating_point():
        return colour * alpha + (1 - alpha)
    alpha = alpha.to(torch.int32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def file_bytes(source: ImageSource, *, name: str) -> bytes | None:
    """What an image file holds, given its path or its bytes; None for an image that is no file.

    Raises:
        MediaError: no such file, or one that cannot be read, in the words of :func:`load_image`.
    """
    if isinstance(source, (str, Path)):
        with opened(source, f"{name} ({source})") as file:
            return file.read()
    return bytes(source) if isinstance(source, (bytes, bytearray, memoryview)) else None


def is_plain_jpeg(data: bytes) -> bool:
    """Whether these are a JPEG file that any decoder reads alike: complete, grey or RGB, within Pillow's limit."""
    if not (data.startswith(b"\xff\xd8\xff") and data.rstrip(b"\0").endswith(b"\xff\xd9")):
        return False
    try:
        with _open(BytesIO(data)) as image:  # reads the header alone
            return image.format == "JPEG" and image.mode in ("L", "RGB")
    except Exception:  # load_image says what it is
        return False


def _from_path(path: str | Path, label: str) -> Tensor:
    with opened(path, label) as file:
        return _decode(file, label)


@contextmanager
def opened(path: str | Path, label: str, kind: str = "an image") -> Iterator[BinaryIO]:
    """Open a file of pictures for reading.

    Args:
        path: of the file.
        label: what error messages call it.
        kind: what they say it should be.

    Raises:
        MediaError: an address, no such file, not a regular one, an empty one, or one that cannot be read.
    """
    if str(path).startswith(("http://", "https://")):
        raise MediaError(f"{label}: addresses are not fetched; download it and give its path")
    try:
        with open(Path(path), "rb", opener=_without_waiting) as file:  # Path.open takes no opener
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MediaError(f"{label}: not a regular file but a pipe or a device; save it to a file first")
            if not status.st_size:
                raise MediaError(f"{label}: empty (0 bytes)")
            yield file
    except FileNotFoundError:
        raise MediaError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise MediaError(f"{label}: a directory, not {kind}") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte in it
        raise MediaError(f"{label}: cannot be read: {error}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe without waiting for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decode(file: BinaryIO, label: str) -> Tensor:
    try:
        with _open(file) as image:
            return _from_pil(image, label)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(
            f"{label}: over {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb; shrink it,"
            " or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except UnidentifiedImageError:
        raise MediaError(f"{label}: not an image that Pillow can read") from None
    except MediaError:
        raise
    except Exception as error:  # Pillow's readers let nearly every exception out of a corrupt file
        raise MediaError(f"{label}: truncated or corrupt: {error}") from None


def _open(file: BinaryIO) -> Image.Image:
    # Pillow only warns up to twice its limit; the filters are global to the process, hence the lock.
    with _open_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file)


def _from_pil(image: Image.Image, label: str) -> Tensor:
    if not image.width * image.height:
        raise MediaError(f"{label}: {image.width}x{image.height} has no pixels")
    try:
        image.load()
        pixels = _eight_bit_array(_upright(image))
    except Exception as error:  # as above, for an image that the caller has opened
        raise MediaError(f"{label}: truncated or corrupt: {error}") from None
    if pixels is None:
        raise MediaError(
            f"{label}: mode {image.mode!r} has 32 bits without a known range; convert it to 8 or 16 bits first"
        )
    return rgb(channels_first(pixels, label), label)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken EXIF: every viewer shows such an image as it is stored
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    turned = image.transpose(method)
    turned.format = image.format  # transpose drops it, _eight_bit_array asks for it
    return turned


def _eight_bit_array(image: Image.Image) -> np.ndarray | None:
    """``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]`` uint8; None for 32-bit modes, whose range nobody knows."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT_AS_I):
        values = np.asarray(image).astype(np.uint32)
        return ((values + 128) // 257).astype(np.uint8)  # 65535 becomes 255, to the nearest
    if image.mode in ("I", "F"):
        return None
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
