"""The TensorRT-LLM backend: the decoder in ``tensorrt_llm.LLM``, on one GPU or several, beside a vision engine."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwen2vl_trt.engines.backends import BACKENDS
from qwen2vl_trt.engines.options import TensorRTLLMOptions
from qwen2vl_trt.engines.tensorrt_llm_api import EMBEDDINGS, OWN, make_llm, vision_input
from qwen2vl_trt.errors import EngineError, program
from qwen2vl_trt.windows import WindowLayout

from ..backends.runners import DecoderRunner, Engines, VisionRunner, runner_module
from ..generation_config import GenerationConfig
from ..scheduling.executor import Counters
from .executor import TensorRTLLMExecutor

_MEMORY_FRACTION = 0.8
"""Of the GPU memory that the weights leave free; the rest is the vision engine's, whose activations share GPU 0."""


def default_device() -> str:
    """The first GPU, where the vision engine runs.

    Raises:
        EngineError: there is none.
    """
    if not gpu_count():
        raise EngineError(
            f"TensorRT-LLM runs on NVIDIA GPUs, and PyTorch {torch.__version__} sees none here. Run on a machine with"
            " one, or build for --backend onnxruntime or torch."
        )
    return "cuda"


def gpu_count() -> int:
    """How many GPUs this process sees."""
    return torch.cuda.device_count()


def load_vision(engines: Engines) -> VisionRunner:
    """The vision engine beside the decoder, loaded when it is first used.

    Raises:
        EngineError: too few GPUs, or TensorRT-LLM is not the one that the folder was built for.
    """
    _check(engines)
    return _LazyVision(engines)


def load_decoder(engines: Engines) -> DecoderRunner:
    """Raises EngineError: TensorRT-LLM shows nothing between prompt and tokens."""
    raise EngineError(
        f"{engines.folder} runs its decoder in TensorRT-LLM, which gives tokens alone: hidden_states (decoder"
        " features, comparisons and timings of the decoder) need --backend torch, onnxruntime or tensorrt"
    )


def load_executor(engines: Engines, reuse_prefixes: bool, counters: Counters) -> TensorRTLLMExecutor:
    """Start TensorRT-LLM: its processes load the checkpoint in the engine folder.

    Raises:
        EngineError: too few GPUs, not the release that the folder was built for, or TensorRT-LLM's own reason.
    """
    options = _check(engines)
    manifest = engines.manifest
    profile = manifest.profile
    try:
        llm = make_llm(
            engines.folder,
            options.tp_size,
            engines.precision.decoder,
            profile.max_num_seqs,
            profile.max_input_len,
            profile.max_seq_len,
            options.tokens_per_step(profile),
            reuse_prefixes,
            _MEMORY_FRACTION,
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"TensorRT-LLM does not load {engines.folder}: {type(error).__name__}: {reason}") from error
    ends = GenerationConfig.from_folder(engines.folder)
    dtype = engines.dtype if manifest.options["vision"] == EMBEDDINGS else None
    return TensorRTLLMExecutor(llm, engines.checkpoint.config, ends, profile.max_num_seqs, dtype, counters)


def _check(engines: Engines) -> TensorRTLLMOptions:
    folder, options, vision = engines.folder, engines.backend.options, engines.manifest.options.get("vision")
    if not isinstance(options, TensorRTLLMOptions) or vision not in (EMBEDDINGS, OWN):
        raise EngineError(f"the options in {folder}'s manifest are corrupt (vision is {vision!r}). Rebuild.")
    engines.backend.load()
    if vision_input() != vision:
        raise EngineError(
            f"{folder} was built for a TensorRT-LLM that takes {_words(vision)}; the one installed takes"
            f" {_words(vision_input())}. Rebuild with {program('build_engines.py')}."
        )
    if gpu_count() < options.tp_size:
        raise EngineError(
            f"{folder} shares its decoder among {options.tp_size} GPUs (--tp-size); PyTorch {torch.__version__} sees"
            f" {gpu_count()} here. Rebuild with a smaller --tp-size, or free or add GPUs."
        )
    return options


def _words(vision: str) -> str:
    return "the vision engine's embeddings" if vision == EMBEDDINGS else "pixels for its own vision tower"


class _LazyVision:
    """Features of images need it, and prompts whose embeddings are handed over; other prompts do not."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._runner: VisionRunner | None = None

    def __call__(self, pixel_values: Tensor, layout: WindowLayout) -> Tensor:
        if self._runner is None:
            backend = BACKENDS[self._engines.manifest.options["vision_backend"]]
            # The runner reads its own backend in the manifest.
            manifest = replace(self._engines.manifest, backend=backend.name, options={})
            runner = runner_module(backend)
            own = replace(self._engines, manifest=manifest, backend=backend, runner=runner)
            self._runner = runner.load_vision(own)
        return self._runner(pixel_values, layout)
