"""How a pipeline treats its requests, as one object: the same for every way of opening one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.errors import LimitError

if TYPE_CHECKING:
    import torch

    from .preprocessing.settings import PreprocessorSettings

DEFAULT_PREFETCH_BYTES = 1 << 30
"""About 170 frames of 1080p that wait, or 12 photos of 12 megapixels that are being decoded."""


@dataclass(frozen=True)
class PipelineOptions:
    """Options of a :class:`~qwen2vl_trt.runtime.pipeline.Pipeline`.

    Attributes:
        min_pixels: smallest image area; smaller ones are enlarged. By default the checkpoint's.
        max_pixels: largest image area; larger ones are shrunk. By default the checkpoint's.
        cap_pixels_per_frame: see :meth:`~qwen2vl_trt.runtime.preprocessing.settings.PreprocessorSettings.from_folder`.
        strict_size: refuse an image or a video that does not fit the engines' limits; by default it is resized to fit.
        image_pixel_limit: most pixels of an image file or a Pillow image, checked before it is decoded.
        video_pixel_limit: most pixels of the frames of a video that are kept, together; larger frames are shrunk when
            they are decoded. By default 768 frames in full HD.
        video_decode_seconds: most seconds of reading and decoding a video.
        generation_config: ``auto`` takes what a request does not say from the checkpoint's ``generation_config.json``;
            ``none`` takes neutral values.
        allow_special_tokens: special tokens in a user's text are read as such; by default they are plain text.
        chat_template: Jinja in place of the checkpoint's chat template, such as one that writes tools.
        max_num_tokens: most prompt tokens that run before the answers under way get their next token, and most image
            tokens of a vision call, unless one image has more; by default 512 on a CPU, 2,048 on a GPU.
        decode: where JPEG files are decoded; the GPU, by nvImageCodec, makes pixels that differ by a level or so.
        reuse_prefixes: a prompt that begins like another's (same tokens, same images) takes the keys and values of the
            beginning from the cache. Answers stay the same, up to the rounding of sums taken in other pieces.
        embedding_cache_bytes: most bytes of vision embeddings kept for images and videos that come again, on the
            engines' device; 0 keeps none.
        overlap: media of waiting requests are loaded on CPU threads, and the vision engine runs on a stream of its own,
            while answers go on; False does one thing after the other, in the same order every time. JPEG files decoded
            on the GPU are queued by the step either way.
        ahead_bytes: most bytes of decoded images and videos that wait for their slot, and of what decoding others
            takes: of an image what its header says, of a video file as much as the largest of late; where nothing
            waits, one request of any size.
        lora_modules: folders of LoRA adapters in PEFT's layout, by the names that ``Request.adapter`` gives. Requests
            with different ones run in one batch. Backend torch on a CPU; linear layers of the decoder alone.

    Raises:
        LimitError: ``max_num_tokens``, ``image_pixel_limit`` or ``video_pixel_limit`` below 1,
            ``video_decode_seconds`` not above 0, or ``embedding_cache_bytes`` or ``ahead_bytes`` below 0.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    cap_pixels_per_frame: bool = True
    strict_size: bool = False
    image_pixel_limit: int = 100_000_000
    video_pixel_limit: int = 768 * 1920 * 1080
    video_decode_seconds: float = 3600.0
    generation_config: Literal["auto", "none"] = "auto"
    allow_special_tokens: bool = False
    chat_template: str | None = None
    max_num_tokens: int | None = None
    decode: Literal["cpu", "gpu"] = "cpu"
    reuse_prefixes: bool = True
    embedding_cache_bytes: int = 256 << 20  # about 140 images of 448x448 in BF16 at 7B's width
    overlap: bool = True
    ahead_bytes: int = DEFAULT_PREFETCH_BYTES
    lora_modules: Mapping[str, str | Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        most = self.max_num_tokens
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise LimitError(f"max_num_tokens is {most!r}; a step reads a whole number of tokens, at least 1 token")
        if self.image_pixel_limit < 1:
            raise LimitError(f"image_pixel_limit is {self.image_pixel_limit}; an image has at least 1 pixel")
        if self.video_pixel_limit < 1:
            raise LimitError(f"video_pixel_limit is {self.video_pixel_limit}; a video has at least 1 pixel")
        if not self.video_decode_seconds > 0:  # true for NaN too
            raise LimitError(f"video_decode_seconds is {self.video_decode_seconds:g}; decoding takes more than 0 s")
        if self.embedding_cache_bytes < 0:
            raise LimitError(f"embedding_cache_bytes is {self.embedding_cache_bytes}; 0 keeps no embedding")
        if self.ahead_bytes < 0:
            raise LimitError(f"ahead_bytes is {self.ahead_bytes}; 0 decodes one request at a time")

    def tokens_per_step(self, device: torch.device) -> int:
        """``max_num_tokens``, or its default on a device."""
        return self.max_num_tokens or (2048 if device.type == "cuda" else 512)

    def preprocessor_settings(self, folder: str | Path, profile: BuildProfile) -> PreprocessorSettings:
        """What the preprocessor of a pipeline over engines has.

        Args:
            folder: the checkpoint.
            profile: the engines' limits.

        Raises:
            CheckpointError: see :meth:`~qwen2vl_trt.runtime.preprocessing.settings.PreprocessorSettings.from_folder`.
            LimitError: ``min_pixels`` above ``max_pixels``.
        """
        from .preprocessing.settings import PreprocessorSettings

        settings = PreprocessorSettings.from_folder(folder, self.cap_pixels_per_frame)
        settings = settings.with_limits(self.min_pixels, self.max_pixels)
        return replace(settings, profile=profile, strict_size=self.strict_size)
