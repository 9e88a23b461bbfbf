"""What an engine is built to take: the limits of both engines, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl_trt.config import VisionConfig
from qwen2vl_trt.errors import BuildError, LimitError, reason
from qwen2vl_trt.hub import TINY, published_name
from qwen2vl_trt.media_options import ImageOptions

if TYPE_CHECKING:
    from qwen2vl_trt.windows import Grid

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class BuildProfile:
    """Limits of a pair of engines; the names are TensorRT-LLM's and vLLM's, the defaults take a full-HD image as it is.

    Attributes:
        min_hw_dims: fewest patches h * w of one image or video frame.
        max_hw_dims: most patches of one.
        max_batch_size: most images or frames in one vision call.
        max_num_seqs: most requests under way: rows of the decoder's batch and of the key-value cache.
        max_input_len: most tokens of a prompt, its image tokens included.
        max_seq_len: most tokens of a prompt and its answer, the length of a row of the key-value cache.

    Raises:
        BuildError: a limit below 1, or two that contradict each other.
    """

    min_hw_dims: int = 16
    max_hw_dims: int = 10816
    max_batch_size: int = 8
    max_num_seqs: int = 8
    max_input_len: int = 6144
    max_seq_len: int = 8192

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
                raise BuildError(f"{flag(field.name)} is {value!r}; it must be a whole number from 1 to {_MOST:,}")
        if self.min_hw_dims > self.max_hw_dims:
            raise BuildError(f"--min-hw-dims {self.min_hw_dims} is larger than --max-hw-dims {self.max_hw_dims}")
        if self.max_input_len >= self.max_seq_len:
            raise BuildError(
                f"--max-input-len {self.max_input_len} leaves no room for an answer within --max-seq-len"
                f" {self.max_seq_len}; it must be smaller"
            )

    @classmethod
    def names(cls) -> list[str]:
        """The limits' names, in order."""
        return [field.name for field in fields(cls)]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BuildProfile:
        """Limits by name, the others at their defaults; raises BuildError for an unknown name or a wrong value."""
        unknown = set(values) - set(cls.names())
        if unknown:
            raise BuildError(f"unknown build limit {min(unknown, key=str)!r}; known: {', '.join(cls.names())}")
        return cls(**values)

    def as_dict(self) -> dict[str, int]:
        """The limits by name."""
        return asdict(self)

    def takes(self, grid: Grid) -> bool:
        """Whether an image or a frame of this grid is within the limits."""
        return self.min_hw_dims <= grid[1] * grid[2] <= self.max_hw_dims

    def check_frame(
        self, grid: Grid, name: str, size: str, config: VisionConfig, options: ImageOptions = ImageOptions()
    ) -> None:
        """Refuse an image or a frame outside the limits.

        Args:
            grid: its ``(t, h, w)`` in patches.
            name: as in ``image 3``.
            size: in pixels, ``4032x3024``.
            config: the vision tower.
            options: what its request says, which wins over options of the command.

        Raises:
            LimitError: with the size, the limits and the way out.
        """
        if self.takes(grid):
            return
        patches = grid[1] * grid[2]
        small = patches < self.min_hw_dims
        limits = {"min_pixels": self.min_hw_dims * config.patch_size**2}
        limits["max_pixels"] = self.max_hw_dims * config.patch_size**2
        limit, other = ("min_pixels", "max_pixels") if small else ("max_pixels", "min_pixels")
        own, opposite = getattr(options, limit), getattr(options, other)
        if opposite is not None and (opposite < limits[limit] if small else opposite > limits[limit]):
            way_out = f"Leave its {other} {opposite} out"
        else:
            option = f"Pass {flag(limit)}" if own is None else f"Give it {limit}"
            way_out = f"{option} {limits[limit]} to {'enlarge' if small else 'shrink'} it"
        raise LimitError(
            f"{name} ({size}) needs {patches:,} patches; this engine takes {self.min_hw_dims:,} to"
            f" {self.max_hw_dims:,} ({flag('min_hw_dims' if small else 'max_hw_dims')}). {way_out}, or rebuild."
        )


def flag(name: str) -> str:
    """The command line's spelling of a limit."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class BuildConfig:
    """One file of ``configs/``: a model and the limits that it names."""

    model: str
    limits: dict[str, int]

    @classmethod
    def from_yaml(cls, path: Path) -> BuildConfig:
        """Read a configuration file; raises BuildError where it is none, or has unknown or impossible entries."""
        import yaml

        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BuildError(f"{path} cannot be read: {reason(error)}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BuildError(f"{path} is not YAML: {reason(error)}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("model"), str):
            raise BuildError(f"{path} does not name its model (model: Qwen2.5-VL-7B)")
        try:
            model = raw.pop("model")
            BuildProfile.from_dict(raw)
            return cls(model, raw)
        except BuildError as error:
            raise BuildError(f"{path}: {error}") from None


def usual_profile(model: str | None) -> BuildProfile:
    """Limits of a model's own file in ``configs/``, however its name is spelt, or the defaults where it has none.

    Raises:
        BuildError: the file of a model that is known is missing or damaged.
    """
    published = published_name((model or "").replace("--", "/"))
    own = _CONFIGS / f"{published or model}.yaml"
    if not (published or model == TINY or own.is_file()):
        return BuildProfile()
    return BuildProfile.from_dict(BuildConfig.from_yaml(own).limits)
