"""The output of a layer in the middle, from the torch backend's modules."""

from __future__ import annotations

from torch import Tensor, nn

from qwen2vl_trt.errors import FeaturesError

from .runners import Engines
from .torch_runner import TorchDecoder, TorchVision


class MergeGroups(nn.Module):
    """Stands in for the vision tower's merger: patches of a group side by side, ``[W, S, C]`` to ``[groups, 4 C]``."""

    def __init__(self, merge_unit: int) -> None:
        super().__init__()
        self.merge_unit = merge_unit

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.merge_unit * x.shape[-1])


def end_vision_after(engines: Engines, layer: int) -> None:
    """Make the vision engine end after a block: it gives ``[T, 4 C]``, see :func:`patches_in_raster_order`.

    Args:
        layer: from 1, the first block.

    Raises:
        FeaturesError: there is no such block, or the backend's engine is one graph that ends after the last.
    """
    runner = engines.vision
    if not isinstance(runner, TorchVision):
        raise _only_torch(engines)
    tower = runner.module
    _check(layer, len(tower.blocks), "vision")
    tower.blocks = tower.blocks[:layer]  # those behind it are neither run nor kept
    tower.merger = MergeGroups(tower.config.merge_unit)  # type: ignore[assignment]


def patches_in_raster_order(groups: Tensor, grid: tuple[int, int, int], merge: int) -> Tensor:
    """Groups ``[h * w / 4, 4 C]`` to patches ``[h * w, C]``; patches of a group stand in raster order within it."""
    _, rows, columns = grid
    inside = groups.view(rows // merge, columns // merge, merge, merge, -1)
    return inside.transpose(1, 2).reshape(rows * columns, -1)


def end_decoder_after(engines: Engines, layer: int) -> None:
    """Make the decoder's hidden states those after a layer, ``hidden_states[layer]`` as Transformers counts.

    The last layer's are what the decoder gives anyway: after the final norm.

    Raises:
        FeaturesError: there is no such layer, or the backend's engine is one graph that ends after the last.
    """
    runner = engines.decoder
    if not isinstance(runner, TorchDecoder):
        raise _only_torch(engines)
    stack = runner.module.model
    _check(layer, len(stack.layers), "decoder")
    if layer < len(stack.layers):
        stack.layers = stack.layers[:layer]
        stack.norm = nn.Identity()  # type: ignore[assignment]


def _check(layer: int, layers: int, source: str) -> None:
    if not 1 <= layer <= layers:
        raise FeaturesError(f"--layer {layer}: the {source} has layers 1 to {layers}")


def _only_torch(engines: Engines) -> FeaturesError:
    return FeaturesError(
        f"--layer needs the torch backend: an engine of {engines.manifest.backend} is one graph that gives only what"
        " the last layer makes. Build with --backend torch."
    )
