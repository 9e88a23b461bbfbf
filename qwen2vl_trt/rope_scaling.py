"""``rope_scaling`` (Transformers 4) or ``rope_parameters`` (5): rotary frequencies for longer prompts.

Meanings are those of Transformers 5 (``modeling_rope_utils``): ``factor`` counts, not the ratio of
``max_position_embeddings`` to ``original_max_position_embeddings``, which release 4.52 takes instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Annotated, Any

from msgspec import Meta, Struct

from .errors import CheckpointError
from .schema import convert, field_path, forbid_unknown_fields

Factor = Annotated[float, Meta(gt=0, le=1e6)]
Theta = Annotated[float, Meta(gt=1, le=1e15)]
Positions = Annotated[int, Meta(ge=1, le=1 << 24)]
Section = Annotated[int, Meta(ge=0, le=1 << 12)]

TABLES = ("rope_scaling", "rope_parameters")

_TYPES = {"mrope": "default"}  # Transformers' own name of it for this model


class LinearScaling(Struct, frozen=True, tag_field="rope_type", tag="linear"):
    """Positions are divided by ``factor``."""

    factor: Factor


class YarnScaling(Struct, frozen=True, tag_field="rope_type", tag="yarn"):
    """YaRN (https://arxiv.org/abs/2309.00071): slow frequencies are divided by ``factor``, fast ones stay.

    Attributes:
        factor: None is ``max_position_embeddings / original_max_position_embeddings``.
        original_max_position_embeddings: positions of the training; None is ``max_position_embeddings``.
        attention_factor: multiplies cosines and sines; None derives it from ``factor``.
        beta_fast: frequencies of at least so many rotations in the training's positions stay; None is 32.
        beta_slow: those of at most so many are divided; None is 1.
        mscale: with ``mscale_all_dim``, weights of ``log(factor)`` in the attention factor's numerator and denominator.
        truncate: round the ends of the ramp outwards to whole indices.
    """

    factor: Factor | None
    original_max_position_embeddings: Positions | None = None
    attention_factor: Factor | None = None
    beta_fast: Factor | None = None
    beta_slow: Factor | None = None
    mscale: Factor | None = None
    mscale_all_dim: Factor | None = None
    truncate: bool = True

    def resolved_factor(self, max_position_embeddings: int) -> float:
        return self.factor or max_position_embeddings / self.original_positions(max_position_embeddings)

    def original_positions(self, max_position_embeddings: int) -> int:
        return self.original_max_position_embeddings or max_position_embeddings

    def resolved_attention_factor(self, max_position_embeddings: int) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        factor = self.resolved_factor(max_position_embeddings)
        if self.mscale and self.mscale_all_dim:
            return _mscale(factor, self.mscale) / _mscale(factor, self.mscale_all_dim)
        return _mscale(factor, 1)

    def ramp(self, head_dim: int, theta: float, max_position_embeddings: int) -> tuple[float, float]:
        """(first, last): frequencies up to index ``first`` stay, those from ``last`` on are divided, linear between."""

        def index(rotations: float) -> float:  # of the frequency that makes so many in the training's positions
            positions = self.original_positions(max_position_embeddings)
            return head_dim * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        first, last = index(self.beta_fast or 32), index(self.beta_slow or 1)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        return first, last + 0.001 if first == last else last


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """The decoder's rotary embedding, with Transformers' defaults; ``mrope_section`` is frequencies of each axis."""

    rope_theta: Theta = 1e6
    mrope_section: tuple[Section, Section, Section] = (16, 24, 24)
    scaling: LinearScaling | YarnScaling | None = None


@dataclass(frozen=True)
class _Types:
    rope_type: str | None = None
    type: str | None = None


_SCALINGS: dict[str, type[LinearScaling] | type[YarnScaling] | None] = {
    "default": None,
    "linear": LinearScaling,
    "yarn": YarnScaling,
}
_COMMON = ("rope_type", "type", "rope_theta", "mrope_section")


def read_rope(text: Mapping[str, Any], place: str) -> Rope:
    """The rotary embedding of a ``text_config`` at ``place``, which is for messages.

    Raises:
        CheckpointError: an unknown type or field, a wrong value, or two tables that differ.
    """
    found = {name: _read_table(text, name, place) for name in TABLES if text.get(name) not in (None, {})}
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{place}: rope_scaling and rope_parameters differ; keep one of them")
    return next(iter(found.values()), None) or _read_table({**text, TABLES[0]: {}}, TABLES[0], place)


def _read_table(text: Mapping[str, Any], name: str, place: str) -> Rope:
    place = field_path(place, f".{name}")
    table = convert(text[name], dict[str, Any], place)
    types = convert(table, _Types, place)
    named = {_TYPES.get(kind, kind) for kind in (types.rope_type, types.type) if kind is not None} or {"default"}
    if len(named) > 1:
        raise CheckpointError(
            f"{place}: rope_type is {shown(types.rope_type)} and type {shown(types.type)}; keep one of them"
        )
    kind = named.pop()
    if kind not in _SCALINGS:
        raise CheckpointError(f"{place}: rope_type is {shown(kind)}; {', '.join(_SCALINGS)} are supported")
    scaling = _SCALINGS[kind]
    read = (*_COMMON, *scaling.__struct_fields__) if scaling else _COMMON
    forbid_unknown_fields(table, read, {"partial_rotary_factor": (1, None)}, place)
    outer, inner = text.get("rope_theta"), table.get("rope_theta")
    if None not in (outer, inner) and outer != inner:
        raise CheckpointError(
            f"{place}: rope_theta is {shown(inner)} in it and {shown(outer)} beside it; keep one of them"
        )
    given = {"rope_theta": outer if inner is None else inner, "mrope_section": table.get("mrope_section")}
    rope = convert({field: value for field, value in given.items() if value is not None}, Rope, place)
    return Rope(
        rope.rope_theta, rope.mrope_section, convert({**table, "rope_type": kind}, scaling, place) if scaling else None
    )
