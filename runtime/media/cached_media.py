"""Images and videos that are recognised when they come again: decoded and embedded once while the cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qwen2vl_trt.media_options import ImageOptions, VideoOptions

from ..inputs.files import labelled
from ..inputs.images import ImageSource
from ..inputs.video import BoundedFile, VideoSource, opened_video
from ..preprocessing.sizes import MediaSize
from .content_keys import PixelKeys, contents_key, file_key
from .embedder import LoadedImage, LoadedVideo, MediaEmbedder, StageTimes
from .embedding_cache import CachedEmbedding, EmbeddingCache


@dataclass(frozen=True)
class Medium:
    """An image or a video of a request.

    Attributes:
        key: names its content and what it is resized to, 16 bytes.
        size: what it is resized to.
        content: its pixels, or its embedding where that was in the cache.
    """

    key: bytes
    size: MediaSize
    content: LoadedImage | LoadedVideo | CachedEmbedding

    @property
    def nbytes(self) -> int:
        """Of its pixels; an embedding is the cache's."""
        return 0 if isinstance(self.content, CachedEmbedding) else self.content.nbytes


class CachedMedia:
    """A :class:`~qwen2vl_trt.runtime.media.embedder.MediaEmbedder` behind an embedding cache.

    A file goes by its bytes and the options of its part, so that one in the cache is not even decoded; anything else by
    its pixels and its size. The same picture as a file and as an array is therefore embedded twice.

    Attributes:
        hits: media that needed no engine call, those repeated within a batch included.
        misses: media that needed one.
    """

    def __init__(self, media: MediaEmbedder, cache: EmbeddingCache) -> None:
        self._media, self._cache = media, cache
        self._pixel_keys = PixelKeys()
        self.hits = self.misses = 0

    def load_image(self, source: ImageSource, name: str, options: ImageOptions = ImageOptions()) -> Medium:
        """Find an image in the cache or load it; raises as ``MediaEmbedder.load_image``."""
        contents = self._media.file_bytes(source, name)
        key = contents_key(contents, f"image {options}") if contents else None
        entry = self._cache.find(key) if key else None
        if key and entry:
            return Medium(key, entry.size, entry)
        image = self._media.load_image(source, name, options, contents)
        return self._medium(key or self._pixel_keys.key([image.pixels], str(image.size.grid)), image)

    def load_video(self, source: VideoSource, name: str, options: VideoOptions = VideoOptions()) -> Medium:
        """The same for a video; raises as :meth:`qwen2vl_trt.runtime.media.embedder.MediaEmbedder.load_video`."""
        if isinstance(source, (str, Path)):
            label = labelled(source, name)
            with opened_video(source, label) as file:  # once: what is decoded is what the key names
                return self.load_video(file, label, options)
        key = self._video_file_key(source, options)
        entry = self._cache.find(key) if key else None
        if key and entry:
            return Medium(key, entry.size, entry)
        video = self._media.load_video(source, name, options)
        # load_video leaves tensors as frames
        frames: Sequence[Tensor] = video.video.frames  # type: ignore[assignment]
        return self._medium(key or self._pixel_keys.key(frames, str(video.size.grid)), video)

    def shorten(
        self, medium: Medium, tokens: int, source: VideoSource, name: str, options: VideoOptions
    ) -> Medium | None:
        """What :meth:`load_video` gave, of at most so many tokens; None if that cannot be.

        See :meth:`qwen2vl_trt.runtime.media.embedder.MediaEmbedder.shorten`.
        """
        loaded = medium.content
        if not isinstance(loaded, LoadedVideo):  # in the cache as a whole
            loaded = self._media.load_video(source, name, options)
        shorter = self._media.shorten(loaded, tokens, name, options)
        if shorter is None:
            return None
        return self._medium(contents_key(medium.key, f"{shorter.size.grid} {shorter.size.frames}"), shorter)

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
            self._cache.store(medium.key, CachedEmbedding(embeds, medium.size))
        return [found[medium.key] for medium in media], times

    def _medium(self, key: bytes, loaded: LoadedImage | LoadedVideo) -> Medium:
        return Medium(key, loaded.size, self._cache.find(key) or loaded)

    def _video_file_key(self, source: VideoSource, options: VideoOptions) -> bytes | None:
        kind = f"video {self._media.sampling} {options}"
        if isinstance(source, BoundedFile):
            return file_key(source, kind)
        return contents_key(source, kind) if isinstance(source, bytes) else None
