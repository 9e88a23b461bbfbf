"""LoRA adapters in PEFT's layout, and what merging one changes of a checkpoint: ``W + scale * B @ A``.

``adapter_config.json`` is PEFT's ``LoraConfig``; ``adapter_model.safetensors`` has tensors by names such as
``base_model.model.<module>.lora_A.weight``. Rules and arithmetic are those of PEFT 0.21 (``tuners/lora``,
``check_target_module_exists``). DoRA: https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from .checkpoint import Checkpoint, TensorLocation, load_tensor, read_header
from .config import read_json
from .errors import CheckpointError
from .files import file_hash
from .foreign import ADAPTER_FILE, lacking
from .schema import IgnoredFields, convert, forbid_unknown_fields
from .weights import EMBEDDING, LM_HEAD, PATCH_EMBEDDING, checkpoint_names, our_name

WEIGHTS_FILE = "adapter_model.safetensors"

Factors = dict[str, tuple[Tensor, Tensor]]
"""``A [r, in]`` and ``scale * B [out, r]`` of layers, FP32, by our name of each."""

Rank = Annotated[int, Meta(ge=1, le=1 << 16)]

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.weight|(\.bias))?")
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_OFF: tuple[Any, ...] = (None, False, [], {}, "")
_SHOWN = 3  # names in an error message; the rest is counted

# Of PEFT 0.5 to 0.21. What changes the answer and is not merged here has to be off.
_IGNORED: IgnoredFields = dict.fromkeys(
    (
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode"),
        *("lora_dropout", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    )
) | dict.fromkeys(
    (
        *("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication"),
        *("loftq_config", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters"),
        *("trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
    ),
    _OFF,
)
_IGNORED |= {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the model's own weights
    "megatron_core": (None, "megatron.core"),
}


@dataclass(frozen=True)
class LoraConfig:
    """What is read of ``adapter_config.json``; names and defaults are PEFT's."""

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, Rank] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> LoraConfig:
        """Read an adapter's configuration.

        Raises:
            CheckpointError: no adapter, of another ``peft_type``, or a field that is unknown or not supported.
        """
        path = folder / ADAPTER_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} is no adapter: it has no {ADAPTER_FILE} (PEFT's layout)")
        raw = read_json(path)
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r:.60}; only 'LORA' can be merged")
        config = convert(raw, cls, str(path))
        forbid_unknown_fields(raw, [each.name for each in fields(cls)], _IGNORED, str(path))
        for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            value = getattr(config, name)
            literal = name.endswith("modules") and not isinstance(value, str)
            for pattern in [value] if isinstance(value, str) else () if literal else value or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise CheckpointError(
                        f"{path}: {name} has {pattern!r:.60}, which is no regular expression: {error}"
                    ) from None
        return config

    def targets(self, module: str) -> bool:
        """Whether a module, by the adapter's name of it, is one that was trained: ``check_target_module_exists``."""
        if _matches(self.exclude_modules, module) or self.saves(module):
            return False
        wanted = self.target_modules
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return not module.endswith(("embed_tokens", "lm_head", "patch_embed.proj"))
        if not _matches(wanted, module):
            return False
        layers = self.layers_to_transform
        if isinstance(wanted, str) or module in (wanted or ()) or layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns or [r"[^.]*"])
        index = next((int(match[1]) for match in found if match), None)
        return index in ([layers] if isinstance(layers, int) else layers)

    def saves(self, module: str) -> bool:
        """Whether a module is one of ``modules_to_save``, or lies in one."""
        return any(f".{saved}." in f".{module}." for saved in self.modules_to_save or ())

    def rank(self, module: str) -> int:
        """Of a trained module."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What ``B @ A`` of a trained module is multiplied by."""
        rank = self.rank(module)
        return _of_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _matches(wanted: str | list[str] | None, module: str) -> bool:
    """PEFT's rule: a regular expression of the whole name, or a list of names and of their ends."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in wanted or ())


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The first pattern's value that matches the end of a name."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        tensors: by their name in the file, without ``base_model.model.``.
        hash: SHA-256 of both files, in hex.
    """

    folder: Path
    config: LoraConfig
    tensors: dict[str, TensorLocation]
    hash: str

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read an adapter's configuration and the header of its weights.

        Raises:
            CheckpointError: see :meth:`LoraConfig.from_folder`; no weights, truncated, corrupt, or not PEFT's names.
        """
        config, path = LoraConfig.from_folder(folder), folder / WEIGHTS_FILE
        if not path.is_file():
            if (folder / "adapter_model.bin").is_file():
                raise CheckpointError(
                    f"{folder} has its weights as pickled adapter_model.bin, which is not read; save it again with PEFT"
                )
            raise lacking(folder, f"has no {WEIGHTS_FILE}")
        header = read_header(path)
        foreign = [name for name in header if not name.startswith(_PREFIX)]
        if foreign:
            raise CheckpointError(f"{path}: {_listed(foreign)} is no name of PEFT's: it does not begin with {_PREFIX}")
        digest = hashlib.sha256((file_hash(folder / ADAPTER_FILE) + file_hash(path)).encode())
        tensors = {name.removeprefix(_PREFIX): location for name, location in header.items()}
        return cls(folder, config, tensors, digest.hexdigest())

    @property
    def name(self) -> str:
        """Of its folder, safe as part of a folder's name."""
        return re.sub(r"[^\w.-]+", "_", self.folder.resolve().name).strip("._-") or "adapter"

    def changes(self, checkpoint: Checkpoint) -> dict[str, Callable[[], Tensor]]:
        """The checkpoint's tensors that the adapter changes, each with the function that computes it.

        The sum is taken in FP32 and rounded once, to the checkpoint's type; type and shape stay.

        Raises:
            CheckpointError: the adapter does not fit the checkpoint, or itself, named; every weight of it is looked at.
                The functions raise it for a tensor that is not finite.
        """
        return _Merge(self, checkpoint).changes()

    def factors(self, checkpoint: Checkpoint) -> Factors:
        """The factors of an adapter that is not merged: of linear layers of the decoder's blocks alone.

        Raises:
            CheckpointError: see :meth:`changes`; or it changes something else, named.
        """
        return _Merge(self, checkpoint).factors()


@dataclass
class _Layer:
    """A trained module's tensors by PEFT's name (``lora_A``, ``lora_B.bias``) to their name in the file."""

    module: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.parts

    @property
    def factors(self) -> tuple[str, str]:
        return ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A", "lora_B")


class _Merge:
    """An adapter and a checkpoint: what fits, and the arithmetic."""

    def __init__(self, adapter: Adapter, checkpoint: Checkpoint) -> None:
        self._adapter, self._config, self._checkpoint = adapter, adapter.config, checkpoint
        self._names = checkpoint_names(checkpoint)
        self._layers: dict[str, _Layer] = {}
        """By our name of the module."""
        self._replaced: dict[str, str] = {}
        """The adapter's tensors that take a checkpoint's place (``modules_to_save``, biases), by our name."""
        for name in adapter.tensors:
            match = _LORA.fullmatch(name)
            if match:
                parts = self._layers.setdefault(our_name(match[1]), _Layer(match[1])).parts
                part = match[2] + (match[3] or "")
            else:
                parts, part = self._replaced, our_name(name.replace(".base_layer.", "."))
            if part in parts:
                raise self._refuse(f"{parts[part]} and {name} are the same weight")
            parts[part] = name
        # One naming of modules throughout: that of Transformers since 4.52, or the one before.
        self._newer = any(our_name(name) != name for name in adapter.tensors)

    def changes(self) -> dict[str, Callable[[], Tensor]]:
        changed = self._checked()
        packed, form = self._checkpoint.packed, self._checkpoint.format
        types = {name: self._checkpoint.entry(name).dtype for name in self._names.values()}
        quantised = [f"{name} ({dtype})" for name, dtype in types.items() if dtype not in _TYPES]
        quantised += [f"{name} ({form.method})" for name in packed if form]
        if quantised:
            raise self._refuse(
                f"{self._checkpoint.folder} is quantised: {_listed(quantised)}; an adapter is merged into BF16, FP16 or"
                " FP32. Take the unquantised checkpoint: --precision fp8, int8, int4 or nvfp4 quantises the merged one."
                " Or give the adapter to serve --lora-modules, which does not merge it"
            )
        return {self._names[ours]: partial(self._merged, ours) for ours in changed}

    def _checked(self) -> Mapping[str, str]:
        """Our names of what the adapter changes, each with its own name of it."""
        changed = self._replaced | {f"{ours}.weight": layer.module for ours, layer in self._layers.items()}
        changed |= {f"{ours}.bias": each.module for ours, each in self._layers.items() if "lora_B.bias" in each.parts}
        self._check_names(changed)
        self._check_complete()
        self._check_shapes()
        for name in self._adapter.tensors:
            if not bool(self._load(name).isfinite().all()):
                raise self._refuse(f"{name} has values that are not finite (NaN or infinity); train or save it again")
        return changed

    def factors(self) -> Factors:
        self._checked()
        factors: Factors = {}
        others = [*self._replaced.values()]
        for ours, layer in self._layers.items():
            if layer.parts.keys() == {"lora_A", "lora_B"} and ours.startswith("model.layers."):
                down, up = (self._load(layer.parts[part]) for part in layer.factors)
                factors[ours] = down, up * self._config.scale(layer.module)
            else:
                others.append(layer.module)
        if others:
            raise self._refuse(
                f"it changes {_listed(others)}; an adapter beside others changes linear layers of the decoder's blocks"
                " alone, without DoRA. --lora merges this one into the model"
            )
        return factors

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._adapter.folder}: {what}")

    def _check_names(self, changed: Mapping[str, str]) -> None:
        config, names = self._config, self._names
        unknown = [theirs for ours, theirs in changed.items() if ours not in names]
        if unknown:
            raise self._refuse(
                f"{_listed(unknown)} is not in {self._checkpoint.folder}: it is an adapter of another model"
            )
        tied = [name for name in (EMBEDDING, LM_HEAD) if name in changed]
        if tied and self._checkpoint.config.text.tie_word_embeddings:
            raise self._refuse(
                f"it changes {_listed(tied)}, but {EMBEDDING} and {LM_HEAD} of {self._checkpoint.folder} are one tensor"
                " (tie_word_embeddings); merge it with PEFT into an untied checkpoint and give that one"
            )
        left = [theirs for ours, theirs in self._replaced.items() if not self._may_replace(ours, theirs)]
        if left:
            raise self._refuse(
                f"{_listed(left)} belongs to no LoRA layer, and neither modules_to_save ({config.modules_to_save}) nor"
                f" bias ({config.bias!r}) of {ADAPTER_FILE} names it"
            )
        stray = [each.module for each in self._layers.values() if not config.targets(each.module)]
        if stray:
            raise self._refuse(
                f"it has weights of {_listed(stray)}, which target_modules of {ADAPTER_FILE}"
                f" ({config.target_modules!r:.100}) does not match"
            )

    def _may_replace(self, ours: str, theirs: str) -> bool:
        module, _, leaf = theirs.replace(".base_layer.", ".").rpartition(".")
        return (
            self._config.saves(module)
            or (leaf == "bias" and self._config.bias != "none")
            or ours in (EMBEDDING, LM_HEAD)  # PEFT saves them where they are trained (save_embedding_layers)
        )

    def _check_complete(self) -> None:
        """Every module that the configuration names has its tensors: else PEFT would make up the rest, or warn."""
        missing = []
        for ours, theirs in self._names.items():
            module, _, leaf = ours.rpartition(".")
            named = self._their_naming(module)
            matrix = leaf == "weight" and len(self._checkpoint.entry(theirs).shape) > 1
            if self._config.saves(named):
                missing += [] if ours in self._replaced else [f"{named}.{leaf}"]
            elif matrix and self._config.targets(named) and module not in self._layers:
                missing.append(named)
        for saved in self._config.modules_to_save or ():
            if not any(f".{saved}." in f".{theirs}" for theirs in self._replaced.values()):
                missing.append(saved)
        if missing:
            raise self._refuse(
                f"target_modules or modules_to_save of {ADAPTER_FILE} name {_listed(missing)}, of which {WEIGHTS_FILE}"
                " has no weights: the adapter is incomplete, of another model, or target_modules names more than"
                " was trained (narrow it there)"
            )
        if not self._layers and not self._replaced:
            raise self._refuse(f"{WEIGHTS_FILE} has no tensors")

    def _their_naming(self, module: str) -> str:
        if not self._newer:
            return module
        if module.startswith("visual."):
            return f"model.{module}"
        return "model.language_model." + module.removeprefix("model.") if module.startswith("model.") else module

    def _check_shapes(self) -> None:
        for ours, theirs in self._replaced.items():
            stored, given = self._checkpoint.entry(self._names[ours]).shape, self._adapter.tensors[theirs].shape
            if stored != given and (ours != PATCH_EMBEDDING or math.prod(stored) != math.prod(given)):
                raise self._misfit(theirs, self._names[ours])
        for ours, layer in self._layers.items():
            (down, up), rank = layer.factors, self._config.rank(layer.module)
            name = self._names[f"{ours}.weight"]
            out, *rest = self._checkpoint.entry(name).shape
            shapes: dict[str, tuple[int, ...]] = {down: (rank, math.prod(rest)), up: (out, rank)}
            if layer.embedding:
                shapes = {down: (rank, out), up: (math.prod(rest), rank)}
                if self._config.use_dora:
                    raise self._refuse(f"{layer.module} is an embedding with DoRA (use_dora); merge it with PEFT")
            elif self._config.lora_bias:
                shapes["lora_B.bias"] = (out,)
            if self._config.use_dora:
                shapes["lora_magnitude_vector"] = (out,)
            if layer.parts.keys() != shapes.keys():
                odd = min(layer.parts.keys() ^ shapes.keys())
                state = "is missing" if odd in shapes else f"is not what {ADAPTER_FILE} says (use_dora, lora_bias)"
                raise self._refuse(f"{layer.module}.{odd} {state}")
            for part, shape in shapes.items():
                given = self._adapter.tensors[layer.parts[part]].shape
                # A convolution's factors have its kernel and 1 x 1, its magnitude a leading 1.
                flat = (*given[:1], math.prod(given[1:])) if len(shape) == 2 else (math.prod(given),)
                if flat != shape:
                    raise self._misfit(layer.parts[part], name, f" at rank {rank}")

    def _misfit(self, theirs: str, name: str, rank: str = "") -> CheckpointError:
        given, stored = self._adapter.tensors[theirs].shape, self._checkpoint.entry(name).shape
        return self._refuse(
            f"{theirs} {list(given)} does not fit {name} {list(stored)} of {self._checkpoint.folder}{rank}: it is an"
            f" adapter of another model, or its {ADAPTER_FILE} of another adapter"
        )

    def _load(self, name: str) -> Tensor:
        return load_tensor(self._adapter.folder / WEIGHTS_FILE, _PREFIX + name).float()

    def _merged(self, ours: str) -> Tensor:
        """A tensor as the merged checkpoint has it."""
        name = self._names[ours]
        location = self._checkpoint.locate(name)
        value = self._load(self._replaced[ours]) if ours in self._replaced else self._checkpoint.load(name).float()
        module, _, leaf = ours.rpartition(".")
        layer = self._layers.get(module)
        if layer is not None and leaf == "weight":
            value = self._sum(value, layer)
        elif layer is not None and "lora_B.bias" in layer.parts:
            value = value + self._config.scale(layer.module) * self._load(layer.parts["lora_B.bias"])
        rounded = value.to(location.dtype).reshape(location.shape)
        if not bool(rounded.isfinite().all()):
            raise self._refuse(f"merged into {name}, it gives values beyond the range of {location.dtype}")
        return rounded

    def _sum(self, weight: Tensor, layer: _Layer) -> Tensor:
        rank, scale = self._config.rank(layer.module), self._config.scale(layer.module)
        down, up = (self._load(layer.parts[part]) for part in layer.factors)
        left, right = (down.T, up.T) if layer.embedding else (up.reshape(-1, rank), down.reshape(rank, -1))
        merged = torch.addmm(weight.flatten(1), left, right, alpha=scale)  # [out, in]
        if self._config.use_dora:
            magnitude = self._load(layer.parts["lora_magnitude_vector"]).reshape(-1, 1)
            merged *= magnitude / merged.norm(dim=1, keepdim=True)
        return merged


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
