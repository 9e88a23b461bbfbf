"""Models and GPUs by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import PlanError
from qwen2vl_trt.foreign import refuse_foreign
from qwen2vl_trt.hub import TINY, find_local, published_name
from qwen2vl_trt.published import SHAPES, published_config

_GPUS = Path(__file__).resolve().parent / "gpus.yaml"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: bytes.
        bandwidth: bytes a second that a copy reaches.
        bf16: dense operations a second that a matrix product reaches.
        fp8: likewise; None where it has no FP8.
        sources: where each of the three rates comes from, by name.
    """

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float | None
    sources: dict[str, str]


def find_gpu(name: str) -> Gpu:
    """Look a GPU up, whatever the case of its name.

    Raises:
        PlanError: unknown; the message names those that are known.
    """
    table = yaml.safe_load(_GPUS.read_text(encoding="utf-8"))
    known = {gpu.lower(): gpu for gpu in table["gpus"]}
    spelled = known.get(name.lower().replace(" ", "-"))
    if spelled is None:
        raise PlanError(f"unknown GPU {name!r}; known: {', '.join(table['gpus'])} ({_GPUS} takes more)")
    sheet, measured = table["gpus"][spelled]["sheet"], table["gpus"][spelled].get("measured", {})
    rates: dict[str, float] = {}
    sources: dict[str, str] = {}
    for rate, unit in (("bandwidth", "TB/s"), ("bf16", "TFLOP/s"), ("fp8", "TFLOP/s")):
        factor = table["attainable"]["bandwidth" if rate == "bandwidth" else "tflops"]
        if rate in measured:
            rates[rate] = measured[rate] * 1e12
            sources[rate] = f"measured on one (data sheet {sheet[rate]:g} {unit})"
        elif rate in sheet:
            rates[rate] = sheet[rate] * factor * 1e12
            sources[rate] = f"assumed {factor:g} of the data sheet's {sheet[rate]:g} {unit}"
    return Gpu(spelled, sheet["memory"] * 1e9, rates["bandwidth"], rates["bf16"], rates.get("fp8"), sources)


def find_config(name: str) -> Qwen2VLConfig:
    """A published model's shape by name, or that of a checkpoint folder; nothing is downloaded.

    Raises:
        PlanError: neither; the message names the models that are known.
        CheckpointError: the folder has no readable ``config.json`` of a Qwen2.5-VL.
    """
    local = find_local(name)
    if local is not None:
        refuse_foreign(local.folder)
        return Qwen2VLConfig.from_folder(local.folder)
    published = published_name(name)
    if published is None:
        raise PlanError(
            f"unknown model {name!r}; known: {TINY}, {', '.join(SHAPES)}, and any checkpoint folder (its config.json is"
            " enough)"
        )
    return Qwen2VLConfig.from_dict(published_config(published))
