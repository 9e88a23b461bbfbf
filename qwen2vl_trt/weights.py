"""From a checkpoint's tensor names to ours, and from its tensors into our modules.

Our modules use the names of the published checkpoints: ``visual.*``, ``model.*`` and ``lm_head.weight``.
Transformers since 4.52 also writes ``model.visual.*`` and ``model.language_model.*``; both dialects load.

Rules, besides the names:

- Tied embeddings: whichever of ``lm_head.weight`` and ``model.embed_tokens.weight`` the checkpoint lacks is
  read from the other. Where it has both, each is read from its own tensor, as in Transformers 5.
- Rotary frequencies (``*.rotary_emb.inv_freq`` and the like) are computed, not learned. Old releases saved
  them; such tensors are ignored. Every other tensor that no module takes is an error.
- Scales of a quantised key-value cache (``*.k_scale``, ``*.v_scale``) are ignored: the cache is not quantised here.
- FP8 weights and their scales keep their types, whatever type the rest is loaded in.
- The vision patch embedding is stored as a convolution ``[C, in, t, p, p]`` and used as a linear layer
  ``[C, in*t*p*p]``: the same bytes. It is the only tensor whose shape may differ.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .layers import FP8Linear
from .transfer import PinnedReader

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
PATCH_EMBEDDING = "visual.patch_embed.proj.weight"

_UNUSED = re.compile(r"(^|\.)rotary(_pos)?_emb\.(original_)?inv_freq$|\.[kv]_scale$")
_TOP_LEVEL = ("visual", "model", "lm_head")
_SHOWN = 5  # names in an error message; the rest is counted


def map_names(names: Iterable[str], tied: bool = False) -> dict[str, str]:
    """Map tensor names of a checkpoint of either dialect to ours.

    Goes through TensorRT-LLM's ``Qwen2VLHfWeightMapper`` where ``tensorrt_llm`` is installed, so that a newer
    dialect that it learns is learned here too; otherwise through the same rules written here.

    Args:
        names: names as the checkpoint writes them.
        tied: whether the output projection shares the embedding's weight (``tie_word_embeddings``).

    Returns:
        Our name to the checkpoint's name. Names of neither dialect stay as they are.

    Raises:
        CheckpointError: two tensors mean the same weight.
    """
    learned = [name for name in names if not _UNUSED.search(name)]
    renamed = _tensorrt_llm_names(learned)
    if renamed is None:
        renamed = {name: _our_name(name) for name in learned}
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
    """``map_names`` of a whole checkpoint: our name to its name.

    Raises:
        CheckpointError: two tensors mean the same weight.
    """
    try:
        return map_names(checkpoint.names, tied=checkpoint.config.text.tie_word_embeddings)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from None


def check_weights(checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> None:
    """Check that a checkpoint and a whole model fit, without reading a tensor.

    Args:
        modules: name prefix to module, for example ``{"visual.": tower, "": decoder}``. Together they must take
            every tensor of the checkpoint. The modules may lie on the meta device.

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
) -> None:
    """Fill a module from a checkpoint, in place, one tensor at a time.

    Peak memory is the module plus one tensor, on the device; the host holds no tensor that goes to a GPU. Parameters
    are replaced, not written into, so the module may lie on the meta device; they come out as copies (nothing stays
    mapped to the file) that need no gradient. Two parameters with one source (tied embeddings) become one parameter.
    Buffers that a checkpoint never holds (``persistent=False``) are left as they are.

    Args:
        module: its parameters and persistent buffers are named ``prefix + name`` in our names.
        prefix: ``"visual."`` for the vision tower, ``""`` for a decoder of ``model.*`` and ``lm_head.*``.
            A checkpoint's tensor counts as left over when it lies under a top-level name that the module uses,
            so either half of a model loads without the other.
        dtype: of floating-point tensors, FP8 weights and their scales apart; None keeps the checkpoint's.
        device: where the tensors go.

    Raises:
        CheckpointError: tensors missing, left over, of another shape or of whole numbers, named; nothing is loaded
            then.
    """
    names = checkpoint_names(checkpoint)
    wanted = _wanted(module, prefix)
    scope = {_top_level(name) for name in wanted}
    _compare(checkpoint, {ours: theirs for ours, theirs in names.items() if _top_level(ours) in scope}, wanted)

    buffers = {prefix + name for name, _ in module.named_buffers()}
    loaded: dict[str, Tensor] = {}
    reader = PinnedReader(torch.device(device)) if torch.device(device).type == "cuda" else None
    for ours, shape in wanted.items():
        theirs = names[ours]
        name, _, leaf = ours.removeprefix(prefix).rpartition(".")
        owner = module.get_submodule(name)
        if theirs not in loaded:
            kept = keeps_type(owner, leaf)
            tensor = checkpoint.load(theirs) if reader is None else reader.read(checkpoint.locate(theirs))
            tensor = _converted(tensor.reshape(shape), None if kept else dtype, device)
            loaded[theirs] = tensor if ours in buffers else nn.Parameter(tensor, requires_grad=False)
        setattr(owner, leaf, loaded[theirs])


def keeps_type(owner: nn.Module, leaf: str) -> bool:
    """Whether a parameter is part of a quantisation, and so of one type whatever the model computes in."""
    return isinstance(owner, FP8Linear) and leaf != "bias"


def _converted(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    # A copy even where nothing changes: what comes from the file is a memory map without the allocator's alignment.
    mapped = tensor.device.type == "cpu"
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=mapped)


def _wanted(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Our name to shape of everything that a module takes from a checkpoint."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _compare(checkpoint: Checkpoint, names: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in wanted if name not in names]
    extra = [theirs for ours, theirs in names.items() if ours not in wanted]
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
            location = checkpoint.locate(theirs)
            if not _fits(ours, location.shape, shape):
                misshapen[theirs] = f"{theirs} {list(location.shape)} instead of {list(shape)}"
            elif not location.dtype.is_floating_point:
                whole[theirs] = f"{theirs} {location.dtype}"
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


def _fits(ours: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if ours.endswith("_scale") and math.prod(stored) == 1:
        return True  # [] or [1]
    if ours == PATCH_EMBEDDING and len(stored) > len(wanted) == 2:
        return (stored[0], math.prod(stored[1:])) == wanted
    return stored == wanted


def _top_level(name: str) -> str:
    return name.partition(".")[0]


def _our_name(name: str) -> str:
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def _tensorrt_llm_names(names: list[str]) -> dict[str, str] | None:
    """The checkpoint's name to ours by TensorRT-LLM's mapper, or None where it is not installed.

    ``filter_weights(prefix, weights)`` renames the keys of a dictionary, keeps those that start with the prefix
    and cuts it off; its values travel untouched, so names can travel as values. It has no rule for
    ``model.visual.``: TensorRT-LLM's vision loader strips that itself.
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
            renamed[theirs] = _our_name(f"{top_level}.{rest}")
    return {name: renamed.get(name, name) for name in names}
