"""Names for images and videos by what they show, so that the same picture is recognised when it comes again."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

import torch
from torch import Tensor

from ..inputs.files import BoundedFile

_SIZE = 16
_READ = 1 << 20


def contents_key(contents: bytes, kind: str) -> bytes:
    """Key of an encoded file: 16 bytes; ``kind`` says how it is decoded."""
    digest = hashlib.sha256(f"{kind} ".encode())
    digest.update(contents)
    return _finish(digest)


def file_key(file: BoundedFile, kind: str) -> bytes:
    """The same of a file that is too large to hold; it is read from its beginning and left there.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256(f"{kind} ".encode())
    file.seek(0)
    while piece := file.read(_READ):
        digest.update(piece)
    file.seek(0)
    return _finish(digest)


class PixelKeys:
    """Keys of decoded pixels.

    On the CPU SHA-256. On another device copying the pixels to the host would cost more than what a cache saves, so
    they are mixed there: each 8-byte word with its place by splitmix64's finaliser (Steele, Lea and Flood 2014) under
    two secret seeds, and added up; 16 bytes come to the host. The seeds are fresh in each object, so its keys compare
    with its own alone.
    """

    def __init__(self) -> None:
        self._seeds = (secrets.randbits(62), secrets.randbits(62))

    def key(self, frames: Iterable[Tensor], kind: str = "") -> bytes:
        """16 bytes that name ``[3, H, W]`` frames: their values, types and sizes, whatever their memory layout.

        ``kind`` says what becomes of them.
        """
        digest = hashlib.sha256(f"{kind} ".encode())
        for frame in frames:
            digest.update(f"{frame.device.type} {frame.dtype} {tuple(frame.shape)} ".encode())
            # [H, W, 3], as a decoded file lies in memory: no copy is made of one.
            values = frame.movedim(0, -1).contiguous().view(torch.uint8).flatten()
            digest.update(values.numpy().data if values.device.type == "cpu" else self.mix(values))
        return _finish(digest)

    def mix(self, values: Tensor) -> bytes:
        """Two 64-bit sums over ``[n]`` uint8, computed on their device."""
        words = torch.nn.functional.pad(values, (0, -len(values) % 8)).view(torch.int64)
        places = torch.arange(len(words), device=words.device)
        sums = [_splitmix(words ^ _splitmix(places + seed)).sum() for seed in self._seeds]
        return torch.stack(sums).cpu().numpy().tobytes()


def _splitmix(x: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical: torch's shift of a signed number is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finish(digest: hashlib._Hash) -> bytes:
    return digest.digest()[:_SIZE]
