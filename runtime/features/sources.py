"""What makes features of images: the vision engine, or the decoder over a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from qwen2vl_trt.errors import LimitError, MediaError

from ..backends.layer_output import end_decoder_after, end_vision_after, patches_in_raster_order
from ..inputs.images import ImageLimits, decoding_bytes
from ..media.embedder import MediaEmbedder
from ..pipeline import Pipeline
from ..preprocessing.medium import Medium
from ..preprocessing.preprocessor import Preprocessor
from ..request import Request

IMAGE_FAULTS = (MediaError, LimitError)
"""What can be wrong with one image; every other error ends the run."""


class FeatureSource(Protocol):
    """One way to make features of images."""

    def size(self, path: str, name: str) -> int:
        """Bytes that decoding an image takes; on any thread, before :meth:`load`."""
        ...

    def load(self, path: str, name: str) -> Medium:
        """Decode an image; on any thread. Raises MediaError and LimitError, as :meth:`size` may."""
        ...

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        """Features ``[tokens, width]`` of each of at most ``max_batch_size`` images."""
        ...


class VisionFeatures:
    """What the vision engine gives: merged tokens ``[h * w / 4, hidden]`` in raster order, as the decoder sees them.

    Args:
        pipeline: whose vision engine, sizes and way to decode to use; with ``layer``, to be used for nothing else.
        layer: of the torch backend, the block from 1 whose output to take instead: patches ``[h * w, width]`` in
            raster order.

    Raises:
        FeaturesError: no such layer, or not of this backend.
    """

    def __init__(self, pipeline: Pipeline, layer: int | None = None) -> None:
        engines = pipeline.engines
        self._config, self._layer = engines.checkpoint.config.vision, layer
        if layer is not None:
            end_vision_after(engines, layer)
        preprocessor = Preprocessor(
            self._config,
            pipeline.settings,
            engines.device,
            engines.dtype,
            decode=pipeline.options.decode,
            image_limits=ImageLimits(pipeline.options.image_pixel_limit),
        )
        self._media = MediaEmbedder(preprocessor, engines.vision, pipeline.profile, self._config)

    def size(self, path: str | bytes, name: str) -> int:
        return decoding_bytes(path)

    def load(self, path: str | bytes, name: str) -> Medium:
        return self._media.preprocessor.load_image(path, name)

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        embeds, _ = self._media.embed(images)
        if self._layer is None:
            return embeds
        merge = self._config.spatial_merge_size
        return [patches_in_raster_order(groups, image.size.grid, merge) for groups, image in zip(embeds, images)]


class DecoderFeatures:
    """The decoder's hidden states ``[S, hidden]`` over a prompt with one image, after the final norm.

    Args:
        pipeline: whose engines to use; with ``layer``, to be used for nothing else.
        prompt: what is asked about each image; ``<image>`` marks its place, in front without.
        layer: of the torch backend, the layer from 1 whose output to take instead, as Transformers counts its
            ``hidden_states``.

    Raises:
        FeaturesError: no such layer, or not of this backend.
    """

    def __init__(self, pipeline: Pipeline, prompt: str, layer: int | None = None) -> None:
        self._vision = VisionFeatures(pipeline)
        self._pipeline, self._prompt = pipeline, prompt
        if layer is not None:
            end_decoder_after(pipeline.engines, layer)

    def size(self, path: str | bytes, name: str) -> int:
        return self._vision.size(path, name)

    def load(self, path: str | bytes, name: str) -> Medium:
        return self._vision.load(path, name)

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        return self._pipeline.hidden_states([Request(self._prompt, [*image.frames]) for image in images])
