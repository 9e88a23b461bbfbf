"""Image file formats: those that are read, and error messages that name the others."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from qwen2vl_trt.errors import MediaError

READ = "JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF and HEIC"

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names; JPEG includes MPO. Pillow's thirty other readers are not tried (EPS runs Ghostscript)."""

_SUFFIXES = frozenset(
    ".bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()  # noqa: SIM905
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_OTHERS = (
    (b"%PDF", "a PDF document; render its pages to PNG or JPEG"),
    (b"8BPS", "a Photoshop document; export it as PNG or JPEG"),
    (b"%!PS", "a PostScript document; render it to PNG"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document; render it to PNG"),
    (b"\xff\x0a", "a JPEG XL image; convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it to PNG or JPEG"),
    (b"\0\0\1\0", "an icon; convert it to PNG"),
    (b"\x1aE\xdf\xa3", "a video, not an image; give it as one"),
    (b"SIMPLE  =", "a FITS image; convert it to PNG or TIFF"),
    (b"v/1\x01", "an OpenEXR image; convert it to PNG or TIFF"),
    (b"\x1f\x8b", "a compressed file (gzip); decompress it"),
    (b"PK\x03\x04", "an archive (zip); unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file with `git lfs pull`"),
)
_lock = threading.Lock()


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that can be read here, in lower case."""
    found = set(_SUFFIXES)
    if _reads_avif():
        found.add(".avif")
    if _heic_reader() is not None:
        found |= {".heic", ".heif"}
    return frozenset(found)


def open_image(file: BinaryIO, label: str) -> ImageFile.ImageFile:
    """Read the header of an image file; the caller checks its size.

    Raises:
        MediaError: an unknown format.
        Exception: whatever Pillow raises for a corrupt file, see :func:`decode_errors`.
    """
    prefix = file.read(1024)
    file.seek(0)
    reader = _heic_reader() if _iso_format(prefix) == "HEIC" else None
    try:
        if reader is not None:
            return reader(file, "")
        with _without_limit():
            return Image.open(file, formats=[*_FORMATS, "AVIF"] if _reads_avif() else _FORMATS)
    except (UnidentifiedImageError, SyntaxError):
        raise MediaError(f"{label}: {_describe(prefix)}") from None


@contextmanager
def decode_errors(label: str) -> Iterator[None]:
    """Turn any exception, of which Pillow raises nearly all for a corrupt file, into a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{label}: truncated or corrupt: {error}") from None


def load_pixels(image: ImageFile.ImageFile) -> None:
    """Decode a file from :func:`open_image`."""
    if image.format == "TIFF":
        with _without_limit():
            image.load_prepare()  # the only reader that checks the limit while decoding, and only here
    image.load()


@contextmanager
def _without_limit() -> Iterator[None]:
    """Lift Pillow's global limit of 89 megapixels, which is no argument of its readers."""
    with _lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@lru_cache(maxsize=1)
def _reads_avif() -> bool:
    """Pillow does from 11.3 on, depending on its build."""
    return find_spec("PIL._avif") is not None


@lru_cache(maxsize=1)
def _heic_reader() -> Callable[[BinaryIO, str], ImageFile.ImageFile] | None:
    """Pillow-heif's, not registered with Pillow for the whole process; None if it is not installed."""
    return importlib.import_module("pillow_heif").HeifImageFile if find_spec("pillow_heif") is not None else None


def _iso_format(prefix: bytes) -> str | None:
    """HEIC, AVIF or video, by the brands of an ISO container; None for other files."""
    if prefix[4:8] != b"ftyp":
        return None
    size = int.from_bytes(prefix[:4], "big")
    brands = [prefix[8:12], *(prefix[at : at + 4] for at in range(16, min(size, len(prefix)), 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF"
    return "HEIC" if brands[0] in _HEIC_BRANDS else "video"


def _describe(prefix: bytes) -> str:
    container = _iso_format(prefix)
    if container == "HEIC" and _heic_reader() is None:
        return 'HEIC, which pillow-heif reads; pip install "qwen2vl-trt[heic]", or convert it to JPEG'
    if container == "AVIF" and not _reads_avif():
        return "AVIF, which Pillow reads from 11.3 on; upgrade it, or convert the image to PNG or JPEG"
    if container == "video" or prefix[8:12] == b"AVI ":
        return "a video, not an image; give it as one"
    for start, name in _OTHERS:
        if prefix.startswith(start):
            return name
    text = prefix.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "an SVG drawing; render it to PNG"
    if text.startswith((b"<html", b"<!doctype html")):
        return "an HTML page, not an image: perhaps a download that failed"
    return f"not an image, or its header is corrupt; {READ} are read"
