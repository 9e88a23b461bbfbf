"""What makes features of images: the vision engine, or the decoder over a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwen2vl_trt.errors import LimitError, MediaError

from ..backends.layer_output import end_decoder_after, end_vision_after, patches_in_raster_order
from ..inputs.images import ImageLimits, decoding_bytes
from ..media.embedder import MediaEmbedder
from ..pipeline import Pipeline
from ..preprocessing.preprocessor import Preprocessor
from ..preprocessing.sizes import Medium
from ..request import Request

IMAGE_FAULTS = (MediaError, LimitError)
"""What can be wrong with one image; every other error ends the run."""


class FeatureSource:
    """One way to make features of images."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Load images as a pipeline does."""
        engines, options = pipeline.engines, pipeline.options
        self._pipeline, self._config = pipeline, engines.checkpoint.config.vision
        self._preprocessor = Preprocessor(
            self._config,
            pipeline.settings,
            engines.device,
            engines.dtype,
            decode=options.decode,
            image_limits=ImageLimits(options.image_pixel_limit),
        )

    def size(self, path: str | bytes, name: str) -> int:
        """Bytes that decoding an image takes; on any thread, before :meth:`load`."""
        return decoding_bytes(path)

    def load(self, path: str | bytes, name: str) -> Medium:
        """Decode an image; on any thread. Raises MediaError and LimitError."""
        return self._preprocessor.load_image(path, name)

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        """Features ``[tokens, width]`` of each image."""
        raise NotImplementedError


class VisionFeatures(FeatureSource):
    """What the vision engine gives: merged tokens ``[h * w / 4, hidden]`` in raster order, as the decoder sees them.

    Args:
        pipeline: whose vision engine, sizes and way to decode to use; with ``layer``, to be used for nothing else.
        layer: of the torch backend, the block from 1 whose output to take instead: patches ``[h * w, width]`` in
            raster order.

    Raises:
        FeaturesError: no such layer, or not of this backend.
    """

    def __init__(self, pipeline: Pipeline, layer: int | None = None) -> None:
        super().__init__(pipeline)
        self._layer = layer
        if layer is not None:
            end_vision_after(pipeline.engines, layer)
        self._media = MediaEmbedder(self._preprocessor, pipeline.engines.vision, pipeline.profile, self._config)

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        embeds, _ = self._media.embed(images)
        if self._layer is None:
            return embeds
        merge = self._config.spatial_merge_size
        return [patches_in_raster_order(groups, image.size.grid, merge) for groups, image in zip(embeds, images)]


class DecoderFeatures(FeatureSource):
    """The decoder's hidden states ``[S, hidden]`` over a prompt with one image, after the final norm.

    Args:
        pipeline: whose engines to use; with ``layer``, to be used for nothing else.
        prompt: what is asked about each image; ``<image>`` marks its place, in front without.
        layer: as Transformers counts its ``hidden_states``; see :class:`VisionFeatures`.
    """

    def __init__(self, pipeline: Pipeline, prompt: str, layer: int | None = None) -> None:
        super().__init__(pipeline)
        self._prompt = prompt
        if layer is not None:
            end_decoder_after(pipeline.engines, layer)

    def extract(self, images: Sequence[Medium]) -> list[Tensor]:
        return self._pipeline.hidden_states([Request(self._prompt, [*image.frames]) for image in images])
