"""What a format is, and a checkpoint's tensors and settings as the formats look at them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen2vl_trt.errors import CheckpointError

from .linear import Numbers, QuantizedLinear

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_AGAIN = "Fetch the checkpoint again, or take the unquantised one"


class Entry(Protocol):
    """What the header of a safetensors file says of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Layer:
    """A quantised linear layer in a checkpoint.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        place: the checkpoint and its format, for messages.
        entries: its tensors, by what follows the layer's name.
        reader: reads a tensor by its whole name.
    """

    name: str
    place: str
    entries: Mapping[str, Entry]
    reader: Callable[[str], Tensor]

    def load(self, leaf: str) -> Tensor:
        """Read one of the tensors."""
        return self.reader(f"{self.name}.{leaf}")

    def dtype(self, leaf: str) -> torch.dtype | None:
        """The type of a tensor; None where there is none."""
        return self.entries[leaf].dtype if leaf in self.entries else None

    def matrix(self, leaf: str, *dtypes: torch.dtype) -> tuple[int, int]:
        """The shape of a tensor that must be there, of one of these types and two dimensions.

        Raises:
            CheckpointError: it is not, named.
        """
        self._find(leaf, dtypes)
        if len(self.entries[leaf].shape) != 2:
            raise self._misfit(leaf, "a matrix is")
        rows, columns = self.entries[leaf].shape
        return rows, columns

    def check(self, leaf: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> None:
        """Check that a tensor is there, of one of these types and one of these shapes.

        Raises:
            CheckpointError: it is not, named.
        """
        self._find(leaf, dtypes)
        if self.entries[leaf].shape not in shapes:
            raise self._misfit(leaf, f"{' or '.join(str(list(shape)) for shape in shapes)} is")

    def groups(self, channels: int, group_size: int) -> int:
        """How many groups the input channels make.

        Raises:
            CheckpointError: the last one would not be whole.
        """
        if channels % group_size:
            raise CheckpointError(
                f"{self.place}: {self.name} has {channels} input channels, no multiple of group_size {group_size}."
                f" {_AGAIN}"
            )
        return channels // group_size

    def group_index(self, leaf: str, groups: int, group_size: int) -> Tensor | None:
        """The group of each input channel, ``[in]`` int64; None where they are in order, or where there is none.

        Raises:
            CheckpointError: there is no such group.
        """
        if leaf not in self.entries:
            return None
        index = self.load(leaf).long()
        if torch.equal(index, torch.arange(len(index)) // group_size):
            return None
        if not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise CheckpointError(
                f"{self.place}: {self.name}.{leaf} names groups {int(index.min())} to {int(index.max())} of {groups}."
                f" {_AGAIN}"
            )
        return index

    def _find(self, leaf: str, dtypes: tuple[torch.dtype, ...]) -> None:
        if leaf not in self.entries:
            raise CheckpointError(f"{self.place}: {self.name} has no {leaf}. {_AGAIN}")
        if self.entries[leaf].dtype not in dtypes:
            raise self._misfit(leaf, f"{' or '.join(map(str, dtypes))} is")

    def _misfit(self, leaf: str, expected: str) -> CheckpointError:
        entry = self.entries[leaf]
        return CheckpointError(
            f"{self.place}: {self.name}.{leaf} is {entry.dtype} {list(entry.shape)}, where {expected} expected by its"
            f" other tensors and the quantization settings. {_AGAIN}"
        )


class Format(Protocol):
    """A way of storing quantised weights, with a checkpoint's settings."""

    @property
    def method(self) -> str:
        """As messages name it."""
        ...

    @property
    def leaves(self) -> Collection[str]:
        """What follows the name of a quantised layer in the names of its tensors, the bias apart."""
        ...

    def is_quantized(self, entries: Mapping[str, Entry]) -> bool:
        """Whether a layer with these tensors is quantised."""
        ...

    def shape(self, layer: Layer) -> tuple[int, int]:
        """Of a layer's weight, ``(out, in)``, once all its tensors fit; reads no weight.

        Raises:
            CheckpointError: one is missing or does not fit, named.
        """
        ...

    def numbers(self, layer: Layer) -> Numbers | None:
        """What a layer is rounded to whose ``shape`` has been asked for; None of FP8."""
        ...

    def read(self, layer: Layer) -> QuantizedLinear:
        """The weight of a layer whose ``shape`` has been asked for.

        Raises:
            CheckpointError: numbers in it that make no sense.
        """
        ...


class Settings:
    """The settings of a quantised checkpoint, as its JSON has them.

    Args:
        place: file and field, for messages.
        raw: what stands there; null is as good as nothing.
    """

    def __init__(self, place: str, raw: Mapping[str, Any]) -> None:
        self.place = place
        self.raw = {name: value for name, value in raw.items() if value is not None}

    def choice(self, name: str, allowed: Collection[Any], default: Any = None) -> Any:
        """A value that must be one of a few.

        Raises:
            CheckpointError: it is another.
        """
        value = self.raw.get(name, default)
        if type(value) not in map(type, allowed) or value not in allowed:
            raise self.refused(name, ", ".join(map(repr, allowed)))
        return value

    def group_size(self, default: int | None = None) -> int:
        """The number of input channels of a group; -1 is all of them.

        Raises:
            CheckpointError: it is no such number.
        """
        value = self.raw.get("group_size", default)
        if type(value) is not int or (value < 1 and value != -1):
            raise self.refused("group_size", "positive numbers and -1")
        return value

    def refused(self, name: str, readable: str) -> CheckpointError:
        """The error of a value that is not read."""
        return CheckpointError(
            f"{self.place}.{name} is {self.raw.get(name)!r:.60}; {readable} can be read. Take the unquantised"
            " checkpoint"
        )
