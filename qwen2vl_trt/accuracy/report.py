"""A comparison's verdict and everything that it rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2vl_trt.engines.manifest import Manifest
from qwen2vl_trt.errors import CompareError
from qwen2vl_trt.files import atomic_write

from .cases import Case
from .comparison import Row
from .figures import Figures
from .tolerance import DECODER_PREFIX, PIXELS, TOKENS, VISION_PREFIX, Tolerance

FORMAT = 1
"""Of the JSON file."""


@dataclass(frozen=True)
class Report:
    """What was compared with what, and how far apart they are.

    Attributes:
        folder: of the engine.
        manifest: its manifest.
        reference: the reference's name.
        tolerance: what the engine is held to.
        cases: what was asked, and the number of prompt tokens of each.
        inputs: our preprocessor and prompt builder against Transformers' processor.
        engine: the engine against the reference.
        yardstick: Transformers in BF16 against it; None where Ctrl-C or an error was before it.
        others: further runners, for information.
        notes: what could not be compared.
        machine: see :func:`qwen2vl_trt.accuracy.machine.machine`.
        command: as it was typed.
        ended_by: the Ctrl-C or the error; without a yardstick there is no verdict.
    """

    folder: Path
    manifest: Manifest
    reference: str
    tolerance: Tolerance
    cases: tuple[tuple[Case, int], ...]
    inputs: Row
    engine: Row
    yardstick: Row | None
    others: tuple[Row, ...]
    notes: tuple[str, ...]
    machine: Mapping[str, Any]
    command: str
    ended_by: BaseException | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """Everything that ran the model."""
        return (self.engine, *self.others, *([] if self.yardstick is None else [self.yardstick]))

    @property
    def asked(self) -> str:
        """The number of cases, for a title."""
        return f"{len(self.cases)} case{'s' * (len(self.cases) != 1)}"

    @cached_property
    def departures(self) -> dict[str, str]:
        """What of the engine's outputs is over the tolerance, and how; blocks are not judged, they explain."""
        if self.yardstick is None:
            return {}
        outputs = self.inputs.outputs | {n: f for n, f in self.engine.outputs.items() if not is_block(n)}
        found = {name: self.departure(name, figures) for name, figures in outputs.items()}
        found["greedy tokens"] = self.tolerance.token_departure(self.engine.agreement)
        return {name: reason for name, reason in found.items() if reason is not None}

    @cached_property
    def first_block(self) -> tuple[str, str] | None:
        """The first block that is over the tolerance, and how; None where none is, or none was recorded."""
        for name, figures in self.engine.outputs.items():
            reason = self.departure(name, figures) if is_block(name) else None
            if reason is not None:
                return name, reason
        return None

    @property
    def layers(self) -> bool:
        """Whether blocks were recorded."""
        return any(is_block(name) for name in self.engine.outputs)

    def departure(self, name: str, figures: Figures) -> str | None:
        """What of one of the engine's outputs is over the tolerance; nothing is judged without a yardstick."""
        if self.yardstick is None:
            return None
        return self.tolerance.departure(name, figures, self.yardstick.outputs.get(name))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; the verdict where there is a yardstick."""
        found: dict[str, Any] = {
            "format": FORMAT,
            "command": self.command,
            "interrupted": self.ended_by is not None,
            "machine": dict(self.machine),
            "engine": {
                "folder": str(self.folder),
                **{name: getattr(self.manifest, name) for name in ("model", "model_hash", "backend", "precision")},
                "profile": self.manifest.profile.as_dict(),
                "versions": self.manifest.versions,
            },
            "reference": self.reference,
            "tolerance": asdict(self.tolerance),
            "cases": [
                {
                    "name": case.name,
                    "prompt_tokens": tokens,
                    "images": [f"{image.shape[2]}x{image.shape[1]}" for image in case.images],
                    "videos": [len(video.frames) for video in case.videos],
                }
                for case, tokens in self.cases
            ],
            "inputs": _row(self.inputs),
            "rows": {
                "engine": _row(self.engine),
                "yardstick": None if self.yardstick is None else _row(self.yardstick),
                "others": [_row(row) for row in self.others],
            },
            "notes": list(self.notes),
        }
        if self.yardstick is None:
            return found
        first = self.first_block
        return found | {
            "departures": self.departures,
            "first_departing_block": first and first[0],
            "passed": not self.departures,
        }

    def write_json(self, path: Path) -> None:
        """Write everything, whole or not at all.

        Raises:
            CompareError: the file cannot be written.
        """
        try:
            atomic_write(path, json.dumps(_finite(self.as_dict()), indent=2, allow_nan=False).encode())
        except OSError as error:
            raise CompareError(f"{path} cannot be written: {error.strerror or error}") from None


def is_block(name: str) -> bool:
    """Whether an output is one of the blocks that ``--layers`` records."""
    return name.startswith((VISION_PREFIX, DECODER_PREFIX))


def is_input(name: str) -> bool:
    """Whether an output is made before the model."""
    return name in (PIXELS, TOKENS)


def _row(row: Row) -> dict[str, Any]:
    agreement = row.agreement
    return {
        "name": row.name,
        "seconds": row.seconds,
        "outputs": {name: asdict(figures) for name, figures in row.outputs.items()},
        "greedy_tokens": asdict(agreement) if agreement.tokens else None,
        "cases": [{name: asdict(measured) for name, measured in case.items()} for case in row.cases],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
