"""Images and videos that are recognised when they come again: decoded and embedded once while the cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qwen2vl_trt.errors import MediaError
from qwen2vl_trt.windows import Grid

from ..inputs.files import opened
from ..inputs.images import ImageSource
from ..inputs.video import VideoSource
from .content_keys import PixelKeys, contents_key, file_key
from .embedder import LoadedImage, LoadedVideo, MediaEmbedder, StageTimes
from .embedding_cache import CachedEmbedding, EmbeddingCache


@dataclass(frozen=True)
class Medium:
    """An image or a video of a request.

    Attributes:
        key: names its content, 16 bytes.
        grid: ``(t, h, w)`` in patches.
        second_per_grid: of a video, seconds between temporal patches.
        content: its pixels, or its embedding where that was in the cache.
    """

    key: bytes
    grid: Grid
    second_per_grid: float
    content: LoadedImage | LoadedVideo | CachedEmbedding

    @property
    def nbytes(self) -> int:
        """Of its pixels; an embedding is the cache's."""
        return 0 if isinstance(self.content, CachedEmbedding) else self.content.nbytes


class CachedMedia:
    """A :class:`~runtime.media.embedder.MediaEmbedder` behind an embedding cache.

    A file goes by its bytes, so that one in the cache is not even decoded; anything else by its pixels. The same
    picture as a file and as an array is therefore embedded twice. The processor's settings are one pipeline's, as the
    cache is, so a content has one size.

    Attributes:
        hits: media that needed no engine call, those repeated within a batch included.
        misses: media that needed one.
    """

    def __init__(self, media: MediaEmbedder, cache: EmbeddingCache) -> None:
        self._media, self._cache = media, cache
        self._pixel_keys = PixelKeys()
        self.hits = self.misses = 0

    def load_image(self, source: ImageSource, name: str) -> Medium:
        """Find an image in the cache or load it; raises as :meth:`runtime.media.embedder.MediaEmbedder.load_image`."""
        contents = self._media.file_bytes(source, name)
        key = contents_key(contents, "image") if contents else None
        entry = self._cache.find(key) if key else None
        if key and entry:
            return Medium(key, entry.grid, 0.0, entry)
        image = self._media.load_image(source, name, contents)
        return self._medium(key or self._pixel_keys.key([image.pixels]), image, 0.0)

    def load_video(self, source: VideoSource, name: str, fps: float | None = None) -> Medium:
        """The same for a video; raises as :meth:`runtime.media.embedder.MediaEmbedder.load_video`."""
        key = self._video_file_key(source, fps)
        entry = self._cache.find(key) if key else None
        if key and entry:
            return Medium(key, entry.grid, entry.second_per_grid, entry)
        video = self._media.load_video(source, name, fps)
        # load_video leaves tensors as frames
        frames: Sequence[Tensor] = video.video.frames  # type: ignore[assignment]
        return self._medium(key or self._pixel_keys.key(frames), video, video.second_per_grid)

    def embed(self, media: Sequence[Medium]) -> tuple[list[Tensor], StageTimes]:
        """Embeddings ``[tokens, C]`` of each, equal contents once, and the time that the engine took."""
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, Medium] = {}
        for medium in media:
            entry = medium.content if isinstance(medium.content, CachedEmbedding) else self._cache.find(medium.key)
            if entry is not None:
                found[medium.key] = entry.embeds
            else:
                missing.setdefault(medium.key, medium)
        contents = [(medium, medium.content) for medium in missing.values()]
        images = [(medium, content) for medium, content in contents if isinstance(content, LoadedImage)]
        videos = [(medium, content) for medium, content in contents if isinstance(content, LoadedVideo)]
        image_embeds, video_embeds, times = self._media.embed([image for _, image in images], [v for _, v in videos])
        self.misses += len(missing)
        self.hits += len(media) - len(missing)
        for (medium, _), embeds in zip([*images, *videos], [*image_embeds, *video_embeds], strict=True):
            found[medium.key] = embeds
            self._cache.store(medium.key, CachedEmbedding(embeds, medium.grid, medium.second_per_grid))
        return [found[medium.key] for medium in media], times

    def _medium(self, key: bytes, loaded: LoadedImage | LoadedVideo, second_per_grid: float) -> Medium:
        entry = self._cache.find(key)
        return Medium(key, loaded.grid, second_per_grid, entry or loaded)

    def _video_file_key(self, source: VideoSource, fps: float | None) -> bytes | None:
        kind = f"video {self._media.sampling} {fps!r}"
        try:
            if isinstance(source, (str, Path)):
                with opened(source, "video") as file:
                    return file_key(file, kind)
            return contents_key(source, kind) if isinstance(source, bytes) else None
        except MediaError:
            return None  # load_video says what is wrong with it
