"""Images and videos that are recognised when they come again: decoded and embedded once while the cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qwen2vl_trt.media_options import ImageOptions, VideoOptions

from ..inputs.files import labelled
from ..inputs.images import ImageSource, file_bytes
from ..inputs.video import BoundedFile, VideoSource, opened_video
from ..preprocessing.sizes import MediaSize, Medium
from .content_keys import PixelKeys, contents_key, file_key
from .embedder import MediaEmbedder, StageTimes
from .embedding_cache import EmbeddingCache

_MOST_SIZES = 4096
"""Video files whose whole size is remembered, a few hundred bytes each."""


class CachedMedia:
    """A :class:`~qwen2vl_trt.runtime.media.embedder.MediaEmbedder` behind an embedding cache.

    A file goes by its bytes and the options of its part, so that one in the cache is not even decoded; anything else by
    its pixels and its size. The same picture as a file and as an array is therefore embedded twice.

    Attributes:
        hits: media that needed no engine call, those repeated within a batch included.
        misses: media that needed one.
    """

    def __init__(self, media: MediaEmbedder, cache: EmbeddingCache) -> None:
        self._media, self._load, self._cache = media, media.preprocessor, cache
        self._pixel_keys = PixelKeys()
        self._whole_sizes: dict[bytes, MediaSize] = {}  # of video files that were made shorter
        self.hits = self.misses = 0

    def load_image(self, source: ImageSource, name: str, options: ImageOptions = ImageOptions()) -> Medium:
        """Find an image in the cache or load it; raises as ``Preprocessor.load_image``."""
        contents = file_bytes(source, name=name, limits=self._load.image_limits)
        key = contents_key(contents, f"image {options}") if contents else None
        entry = self._cache.find(key) if key else None
        return entry or self._keyed(self._load.load_image(source, name, options, contents), key)

    def load_video(
        self, source: VideoSource, name: str, options: VideoOptions = VideoOptions(), whole: bool = True
    ) -> Medium:
        """The same for a video; raises as ``Preprocessor.load_video``.

        Args:
            source: see there.
            name: what error messages call it.
            options: of its frames and their size.
            whole: False gives the size alone of a file that :meth:`shorten` has made shorter before: it probably will
                again, and then not be decoded.
        """
        if isinstance(source, (str, Path)):
            label = labelled(source, name)
            with opened_video(source, label) as file:  # once: what is decoded is what the key names
                return self.load_video(file, label, options, whole)
        key = self._video_file_key(source, options)
        if key and (entry := self._cache.find(key)):
            return entry
        if key and not whole and (size := self._whole_sizes.get(key)):
            return Medium(size, key=key)
        return self._keyed(self._load.load_video(source, name, options), key)

    def shorten(
        self, medium: Medium, tokens: int, source: VideoSource, name: str, options: VideoOptions
    ) -> Medium | None:
        """What :meth:`load_video` gave, of at most so many tokens, by smaller frames and then by fewer.

        None where neither is enough.
        """
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

    def _keyed(self, loaded: Medium, key: bytes | None) -> Medium:
        key = key or self._pixel_keys.key(loaded.frames, str(loaded.size.grid))
        return replace(self._cache.find(key) or loaded, key=key, size=loaded.size)

    def _video_file_key(self, source: VideoSource, options: VideoOptions) -> bytes | None:
        kind = f"video {self._load.settings.sampling} {options}"
        if isinstance(source, BoundedFile):
            return file_key(source, kind)
        return contents_key(source, kind) if isinstance(source, bytes) else None
