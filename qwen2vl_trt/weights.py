"""A checkpoint's tensors into modules, which have the published checkpoints' names (``visual.*``, ``model.*``).

- Transformers since 4.52 also writes ``model.visual.*`` and ``model.language_model.*``.
- Tied embeddings: of ``lm_head.weight`` and ``model.embed_tokens.weight``, one that is missing is read from the other.
- The vision patch embedding is stored as a convolution ``[C, in, t, p, p]`` and used as a linear layer: the same bytes.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .layers import BlockedLinear, FP8Linear
from .quantized.linear import PackedWeight
from .transfer import PinnedReader

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
PATCH_EMBEDDING = "visual.patch_embed.proj.weight"

# Ignored: rotary frequencies, which old releases saved, and scales of a quantised cache, which is not quantised here.
_UNUSED = re.compile(r"(^|\.)rotary(_pos)?_emb\.(original_)?inv_freq$|\.[kv]_scale$")
_TOP_LEVEL = ("visual", "model", "lm_head")
_SHOWN = 5  # names in an error message; the rest is counted


def map_names(names: Iterable[str], tied: bool = False) -> dict[str, str]:
    """Our name to the checkpoint's, through TensorRT-LLM's weight mapper where it is installed.

    Args:
        names: the checkpoint's; unknown ones stay as they are.
        tied: ``tie_word_embeddings``.

    Raises:
        CheckpointError: two tensors mean the same weight.
    """
    learned = [name for name in names if not _UNUSED.search(name)]
    renamed = _tensorrt_llm_names(learned)
    if renamed is None:
        renamed = {name: our_name(name) for name in learned}
    mapped: dict[str, str] = {}
    for theirs, ours in renamed.items():
        if ours in mapped:
            raise CheckpointError(f"checkpoint: tensors {mapped[ours]!r} and {theirs!r} are the same weight {ours!r}")
        mapped[ours] = theirs
    if tied and EMBEDDING in mapped:
        mapped.setdefault(LM_HEAD, mapped[EMBEDDING])
    elif tied and LM_HEAD in mapped:
        mapped[EMBEDDING] = mapped[LM_HEAD]
    return mapped


def checkpoint_names(checkpoint: Checkpoint) -> dict[str, str]:
    """:func:`map_names` of a whole checkpoint."""
    try:
        return map_names(checkpoint.names, tied=checkpoint.config.text.tie_word_embeddings)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from None


def check_weights(checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> None:
    """Check that a checkpoint and a whole model fit, without reading a tensor.

    Args:
        modules: prefix to module, as ``{"visual.": tower, "": decoder}``, which together take every tensor; may be on
            the meta device.

    Raises:
        CheckpointError: tensors missing, left over, of another shape or of whole numbers, named.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for prefix, module in modules.items():
        wanted |= _wanted(module, prefix)
    _compare(checkpoint, checkpoint_names(checkpoint), wanted)


@torch.no_grad()
def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantized: Callable[[nn.Linear, PackedWeight], nn.Module | None] | None = None,
    mapped: bool = False,
) -> None:
    """Fill a module from a checkpoint, one tensor at a time, to a GPU without a copy on the host.

    Parameters are replaced, so the module may be on the meta device; they need no gradient. Two parameters of one
    tensor (tied embeddings) become one.

    Args:
        module: its parameters and persistent buffers are named ``prefix + name``.
        prefix: ``"visual."`` for the vision tower, ``""`` for the decoder. The other half's tensors are not looked at.
        dtype: of floating-point tensors but FP8 weights and their scales; None keeps the checkpoint's.
        device: of the loaded tensors.
        quantized: makes the layer of a weight that the checkpoint packs, of the layer whose bias alone is loaded; where
            it gives None, which a line counts, and without it, the weight is dequantised.
        mapped: matrices stay as the checkpoint has them, on the CPU and mapped to its file, for a caller that makes its
            own of each. Otherwise nothing stays mapped.

    Raises:
        CheckpointError: tensors missing, left over, of another shape or of whole numbers, named; nothing is loaded.
    """
    names = checkpoint_names(checkpoint)
    wanted = _wanted(module, prefix)
    scope = {_top_level(name) for name in wanted}
    _compare(checkpoint, {ours: theirs for ours, theirs in names.items() if _top_level(ours) in scope}, wanted)

    buffers = {prefix + name for name, _ in module.named_buffers()}
    loaded: dict[str, Tensor] = {}
    reader = PinnedReader(torch.device(device)) if torch.device(device).type == "cuda" else None
    others = 0
    # Packed weights last: their layers are made with a bias.
    for ours in sorted(wanted, key=lambda ours: names[ours] in checkpoint.packed):
        shape, theirs = wanted[ours], names[ours]
        name, _, leaf = ours.removeprefix(prefix).rpartition(".")
        owner = module.get_submodule(name)
        if quantized is not None and theirs in checkpoint.packed and isinstance(owner, nn.Linear):
            layer = quantized(owner, checkpoint.packed[theirs])
            if layer is not None:
                module.set_submodule(name, layer)
                continue
            others += 1
        if theirs not in loaded:
            kept = keeps_type(owner, leaf)
            if mapped and len(shape) > 1 and theirs not in checkpoint.packed:
                tensor = checkpoint.map(theirs)
            elif reader is None or theirs in checkpoint.packed:
                tensor = checkpoint.load(theirs)
            else:
                tensor = reader.read(checkpoint.locate(theirs))
            tensor = tensor.reshape(shape)
            if not mapped or tensor.ndim < 2:
                wanted_type = dtype if tensor.is_floating_point() and not kept else None
                # A copy even where nothing changes: a memory map lacks the allocator's alignment.
                tensor = tensor.to(device=device, dtype=wanted_type, copy=tensor.device.type == "cpu")
            loaded[theirs] = tensor if ours in buffers else nn.Parameter(tensor, requires_grad=False)
        setattr(owner, leaf, loaded[theirs])
    if others:
        logger.warning(
            "%s: %d quantised layers are dequantised as they are loaded: they are in FP8, or their groups no power of"
            " two from 16 on",
            checkpoint.folder,
            others,
        )


def keeps_type(owner: nn.Module, leaf: str) -> bool:
    """Whether a parameter is a quantised weight or a scale of its own type, which does not depend on the model's."""
    if isinstance(owner, BlockedLinear):
        return leaf not in (*BlockedLinear.SCALES, "bias")
    return isinstance(owner, FP8Linear) and leaf != "bias"


def _wanted(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Name to shape of what a module takes from a checkpoint."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _compare(checkpoint: Checkpoint, names: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in wanted if name not in names]
    extra = [theirs for ours, theirs in names.items() if ours not in wanted and not _no_bias(checkpoint, theirs)]
    if checkpoint.config.text.tie_word_embeddings:
        if EMBEDDING in missing and LM_HEAD in missing:  # one tensor would do for both
            missing.remove(LM_HEAD)
        # A tied module may hold only one of the two.
        extra = [theirs for theirs in extra if theirs not in (names.get(LM_HEAD), names.get(EMBEDDING))]
    misshapen: dict[str, str] = {}  # by their name: two parameters may have one source
    whole: dict[str, str] = {}
    for ours, shape in wanted.items():
        if ours in names:
            theirs = names[ours]
            entry = checkpoint.entry(theirs)
            if not _fits(ours, entry.shape, shape):
                misshapen[theirs] = f"{theirs} {list(entry.shape)} instead of {list(shape)}"
            elif not entry.dtype.is_floating_point:
                whole[theirs] = f"{theirs} {entry.dtype}"
    problems = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for what, found in (
            ("missing", missing),
            ("unexpected", extra),
            ("misshapen", list(misshapen.values())),
            ("not of floating point", list(whole.values())),
        )
        if found
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.folder} does not fit its config.json; tensors: {'; '.join(problems)}")


def _no_bias(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a bias of zeros, which AutoGPTQ gives to quantised layers that have none."""
    layer, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{layer}.weight" in checkpoint.packed and not checkpoint.load(name).any()


def _fits(ours: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if ours.endswith("_scale") and math.prod(stored) == 1:
        return True  # [] or [1]
    if ours == PATCH_EMBEDDING and len(stored) > len(wanted) == 2:
        return (stored[0], math.prod(stored[1:])) == wanted
    return stored == wanted


def _top_level(name: str) -> str:
    return name.partition(".")[0]


def our_name(name: str) -> str:
    """A tensor's or a module's name as the published checkpoints have it."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def _tensorrt_llm_names(names: list[str]) -> dict[str, str] | None:
    """The checkpoint's name to ours by TensorRT-LLM's mapper; None where it is not installed.

    ``filter_weights(prefix, weights)`` renames a dictionary's keys and cuts the prefix off those that have it; here the
    values are the names. It has no rule for ``model.visual.``, which TensorRT-LLM's vision loader strips itself.
    Source: tensorrt_llm/_torch/models/checkpoints/hf/qwen2vl_weight_mapper.py.
    """
    if importlib.util.find_spec("tensorrt_llm") is None:
        return None
    try:
        from tensorrt_llm._torch.models.checkpoints.hf.qwen2vl_weight_mapper import Qwen2VLHfWeightMapper

        mapper = Qwen2VLHfWeightMapper()
    except Exception as error:  # it initialises MPI and CUDA at import: on some machines anything can go wrong
        logger.warning("tensorrt_llm is installed but its weight mapper does not load (%s); using our own", error)
        return None
    renamed = {}
    for top_level in _TOP_LEVEL:
        weights = {name: name for name in names if name.startswith(f"{top_level}.")}
        for rest, theirs in mapper.filter_weights(top_level, weights).items():
            renamed[theirs] = our_name(f"{top_level}.{rest}")
    return {name: renamed.get(name, name) for name in names}
