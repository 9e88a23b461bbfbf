"""Hidden states after an intermediate layer, from the torch backend's modules."""

from __future__ import annotations

from torch import Tensor, nn

from qwen2vl_trt.errors import FeaturesError

from .runners import Engines
from .torch_runner import TorchDecoder, TorchVision


class MergeGroups(nn.Module):
    """Replaces the vision tower's merger: concatenates the patches of a group, ``[W, S, C]`` to ``[groups, 4 C]``."""

    def __init__(self, merge_unit: int) -> None:
        super().__init__()
        self.merge_unit = merge_unit

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.merge_unit * x.shape[-1])


def end_vision_after(engines: Engines, layer: int) -> None:
    """Cut the vision tower after block ``layer``, from 1; it then returns groups for :func:`patches_in_raster_order`.

    Raises:
        FeaturesError: no such block, or not the torch backend.
    """
    runner = engines.vision
    if not isinstance(runner, TorchVision):
        raise _needs_torch(engines)
    tower = runner.module
    _check(layer, len(tower.blocks), "vision")
    tower.blocks = tower.blocks[:layer]
    tower.merger = MergeGroups(tower.config.merge_unit)  # type: ignore[assignment]


def patches_in_raster_order(groups: Tensor, grid: tuple[int, int, int], merge: int) -> Tensor:
    """Groups ``[h * w / 4, 4 C]``, each in raster order, to patches ``[h * w, C]``."""
    _, rows, columns = grid
    inside = groups.view(rows // merge, columns // merge, merge, merge, -1)
    return inside.transpose(1, 2).reshape(rows * columns, -1)


def end_decoder_after(engines: Engines, layer: int) -> None:
    """Cut the decoder so that it returns Transformers' ``hidden_states[layer]``; the last is after the final norm.

    Raises:
        FeaturesError: no such layer, or not the torch backend.
    """
    runner = engines.decoder
    if not isinstance(runner, TorchDecoder):
        raise _needs_torch(engines)
    stack = runner.module.model
    _check(layer, len(stack.layers), "decoder")
    if layer < len(stack.layers):
        stack.layers = stack.layers[:layer]
        stack.norm = nn.Identity()  # type: ignore[assignment]


def _check(layer: int, layers: int, source: str) -> None:
    if not 1 <= layer <= layers:
        raise FeaturesError(f"--layer {layer}: the {source} has layers 1 to {layers}")


def _needs_torch(engines: Engines) -> FeaturesError:
    return FeaturesError(
        f"--layer needs the torch backend: an engine of {engines.manifest.backend} is one graph that gives only what"
        " the last layer makes. Build with --backend torch."
    )
