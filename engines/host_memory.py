"""Whether a model fits the memory of a machine that runs it on its CPU, before it is tried."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.quantized.blocks import LARGEST_BLOCK, SMALLEST_BLOCK
from qwen2vl_trt.weights import EMBEDDING, LM_HEAD, checkpoint_names

from .backends import BACKENDS, Backend
from .precision import BF16, Precision

logger = logging.getLogger(__name__)

_said: set[tuple[str, str, str]] = set()
"""Of which models, backends and precisions it was said: a command that builds engines opens them next."""

_CGROUPS = Path("/sys/fs/cgroup")


def warn_of_memory(checkpoint: Checkpoint, backend: Backend, precision: Precision) -> None:
    """Log one line, once a process, where a model is expected not to fit into free memory; swap may still run it."""
    needed, free = expected_bytes(checkpoint, backend, precision), available_bytes()
    if needed is None or needed <= free:
        return
    key = (checkpoint.hash, backend.name, precision.name)
    if key in _said:
        return
    _said.add(key)
    smallest = expected_bytes(checkpoint, BACKENDS["torch"], BF16)
    assert smallest is not None
    advice = ""
    if smallest < needed:
        fits = "fits" if smallest <= free else "is the smallest"
        advice = f"; --backend torch --precision bf16 needs about {_in_words(smallest)} and {fits}"
    logger.warning(
        "%s: backend %s in %s needs about %s of memory on a CPU, and %s are free here%s",
        checkpoint.folder,
        backend.name,
        precision.name,
        _in_words(needed),
        _in_words(free),
        advice,
    )


def expected_bytes(checkpoint: Checkpoint, backend: Backend, precision: Precision) -> int | None:
    """What loading a model on a CPU takes, weights alone; None where nothing has been measured.

    PyTorch holds every weight in its precision. ONNX Runtime makes FP32 weights of BF16 ones, all but an untied
    embedding, whose rows are read as they are needed; while it loads, the largest of them is there twice. Weights of 4
    and 8 bits stay as they are, with FP32 scales; ``lm_head`` has 8.
    """
    sizes = {ours: math.prod(checkpoint.entry(theirs).shape) for ours, theirs in checkpoint_names(checkpoint).items()}
    if checkpoint.config.text.tie_word_embeddings:
        sizes.pop(LM_HEAD, None)
    packed = _packed_bytes(checkpoint, precision)
    if backend.cpu_weights == "as built" and not precision.fp8:
        types = {True: precision.vision, False: precision.decoder}
        plain = {name: size * types[name.startswith("visual.")].itemsize for name, size in sizes.items()}
        return round(sum((plain | packed).values()))
    if backend.cpu_weights == "fp32" and not precision.fp8:
        if checkpoint.config.text.tie_word_embeddings:
            sizes[LM_HEAD] = sizes.pop(EMBEDDING)
        else:
            sizes.pop(EMBEDDING, None)
        held = {name: packed.get(name, torch.float32.itemsize * size) for name, size in sizes.items()}
        return round(sum(held.values()) + max(held.values(), default=0))
    return None


def _packed_bytes(checkpoint: Checkpoint, precision: Precision) -> dict[str, float]:
    """What the decoder's weights of 4 and 8 bits take, by our names."""
    found: dict[str, float] = {}
    if precision.weight_only is None:
        return found
    names = checkpoint_names(checkpoint)
    each = {"int4": 0.5 + 4 / LARGEST_BLOCK, "int8": 1 + 4 / LARGEST_BLOCK, "nvfp4": 1 + 4 / SMALLEST_BLOCK}
    for ours, theirs in names.items():
        weight = checkpoint.packed.get(theirs)
        if weight is not None and weight.numbers == precision.weight_only and not ours.startswith("visual."):
            found[ours] = each[precision.weight_only] * math.prod(weight.shape)
    if LM_HEAD in names:
        found.setdefault(LM_HEAD, each["int8"] * math.prod(checkpoint.entry(names[LM_HEAD]).shape))
    return found


def available_bytes() -> int:
    """Memory that a process can still get: what the machine has free, or its control group leaves it."""
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = _CGROUPS, "memory.max", "memory.current"
        elif controllers == "memory":
            root, limit, usage = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / group, *(root / parent for parent in group.parents)):
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group in this container, or no limit ("max")
                continue
            cache = sum(int(stat.get(f"{state}_file", 0)) for state in ("active", "inactive"))  # given back on demand
            yield max(most - used + cache, 0)


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
