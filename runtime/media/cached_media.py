"""Images and videos that are recognised when they come again: decoded and embedded once while the cache holds them."""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from qwen2vl_trt.media_options import ImageOptions, VideoOptions

from ..inputs.files import labelled
from ..inputs.images import ImageSource, file_bytes
from ..inputs.video import BoundedFile, VideoSource, opened_video
from ..preprocessing.sizes import MediaSize, Medium
from .embedder import MediaEmbedder, StageTimes

_KEY_BYTES = 16
_READ = 1 << 20
_MOST_SIZES = 4096
"""Video files whose whole size is remembered, a few hundred bytes each."""


class CachedMedia:
    """A :class:`~qwen2vl_trt.runtime.media.embedder.MediaEmbedder` behind an embedding cache.

    The key of a file is its bytes and the options of its part, so one in the cache is not even decoded; of anything
    else its pixels and its size. So the same picture as a file and as an array is embedded twice, and so is one under
    two ``salt``.

    Attributes:
        hits: media that needed no engine call, those repeated within a batch included.
        misses: media that needed one.
    """

    def __init__(self, media: MediaEmbedder, cache: EmbeddingCache) -> None:
        self._media, self._load, self._cache = media, media.preprocessor, cache
        self._pixel_keys = PixelKeys()
        self._whole_sizes: dict[bytes, MediaSize] = {}  # of video files that were made shorter
        self.hits = self.misses = 0

    def load_image(
        self, source: ImageSource, name: str, options: ImageOptions = ImageOptions(), salt: str = ""
    ) -> Medium:
        """Find an image in the cache or load it; raises as ``Preprocessor.load_image``."""
        contents = file_bytes(source, name=name, limits=self._load.image_limits)
        key = contents_key(contents, f"image {options}{salt}") if contents else None
        entry = self._cache.find(key) if key else None
        return entry or self._keyed(self._load.load_image(source, name, options, contents), key, salt)

    def load_video(
        self,
        source: VideoSource,
        name: str,
        options: VideoOptions = VideoOptions(),
        salt: str = "",
        whole: bool = True,
    ) -> Medium:
        """The same for a video; raises as ``Preprocessor.load_video``.

        ``whole=False`` gives the size alone, undecoded, of a file that :meth:`shorten` has made shorter before.
        """
        if isinstance(source, (str, Path)):
            label = labelled(source, name)
            with opened_video(source, label) as file:  # once: what is decoded is what the key names
                return self.load_video(file, label, options, salt, whole)
        key = self._video_file_key(source, options, salt)
        if key and (entry := self._cache.find(key)):
            return entry
        if key and not whole and (size := self._whole_sizes.get(key)):
            return Medium(size, key=key)
        return self._keyed(self._load.load_video(source, name, options), key, salt)

    def shorten(
        self, medium: Medium, tokens: int, source: VideoSource, name: str, options: VideoOptions, salt: str = ""
    ) -> Medium | None:
        """What :meth:`load_video` gave, in so many tokens, by smaller frames and then by fewer; None if that fails."""
        shorter = self._load.sizes.video_within(tokens, medium.size, name=name, options=options)
        if shorter is None:
            return None
        size, kept = shorter
        if len(self._whole_sizes) >= _MOST_SIZES:
            self._whole_sizes.clear()
        self._whole_sizes[medium.key] = medium.size
        key = contents_key(medium.key, f"{size.grid} {size.frames}")
        if entry := self._cache.find(key):
            return replace(entry, size=size)
        frames = medium.frames or self._load.load_video(source, name, options).frames
        return Medium(size, [frames[number] for number in kept], key=key)

    def embed(self, media: Sequence[Medium]) -> tuple[list[Tensor], StageTimes]:
        """Embeddings ``[tokens, C]`` of each, equal contents once, and the time that the engine took."""
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, Medium] = {}
        for medium in media:
            entry = medium if medium.embeds is not None else self._cache.find(medium.key)
            if entry is not None and entry.embeds is not None:
                found[medium.key] = entry.embeds
            else:
                missing.setdefault(medium.key, medium)
        embeds, times = self._media.embed(list(missing.values()))
        self.misses += len(missing)
        self.hits += len(media) - len(missing)
        for medium, made in zip(missing.values(), embeds, strict=True):
            found[medium.key] = made
            self._cache.store(medium.key, made, medium.size)
        return [found[medium.key] for medium in media], times

    def _keyed(self, loaded: Medium, key: bytes | None, salt: str) -> Medium:
        key = key or self._pixel_keys.key(loaded.frames, f"{loaded.size.grid}{salt}")
        return replace(self._cache.find(key) or loaded, key=key, size=loaded.size)

    def _video_file_key(self, source: VideoSource, options: VideoOptions, salt: str) -> bytes | None:
        kind = f"video {self._load.settings.sampling} {options}{salt}"
        if isinstance(source, BoundedFile):
            return file_key(source, kind)
        return contents_key(source, kind) if isinstance(source, bytes) else None


class EmbeddingCache:
    """The most recently used embeddings by content key, up to ``limit`` bytes; 0 holds none. Any thread may use it.

    Attributes:
        nbytes: bytes held now.
        evictions: embeddings dropped for others.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = self.evictions = 0
        self._entries: OrderedDict[bytes, tuple[Tensor, MediaSize]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: bytes) -> Medium | None:
        """What is embedded under a key, which makes it the most recently used."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
        embeds, size = entry
        return Medium(size, embeds=embeds, key=key)

    def store(self, key: bytes, embeds: Tensor, size: MediaSize) -> None:
        """Hold a copy of ``[tokens, C]``, unless it alone is over the limit; the least recently used are dropped."""
        if key in self._entries or embeds.nbytes > self.limit:
            return
        # A view would keep the whole batch that it was computed in.
        embeds = embeds.clone()
        with self._lock:
            self._entries[key] = embeds, size
            self.nbytes += embeds.nbytes
            while self.nbytes > self.limit:
                _, (dropped, _) = self._entries.popitem(last=False)
                self.nbytes -= dropped.nbytes
                self.evictions += 1

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0


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
    """Keys of decoded pixels: SHA-256 on the CPU, sums that are made on the device elsewhere.

    Such a sum mixes each 8-byte word with its place by splitmix64's finaliser (Steele, Lea and Flood 2014) under a
    secret seed of the object, so that keys of one object alone compare; 16 bytes come to the host.
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
    return digest.digest()[:_KEY_BYTES]
