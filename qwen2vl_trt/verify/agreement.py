"""The tiny model's engines beside Transformers in FP32, or beside the torch backend's where packages are missing."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from qwen2vl_trt.accuracy.figures import Agreement, measure
from qwen2vl_trt.accuracy.tolerance import HIDDEN_STATES, IMAGE_EMBEDS, LOGITS, tolerance_of
from qwen2vl_trt.engines.backends import find_backend
from qwen2vl_trt.engines.build import build_engines
from qwen2vl_trt.engines.profile import usual_profile
from qwen2vl_trt.hub import TINY, resolve_model
from qwen2vl_trt.runtime.backends.runners import Engines, open_engines
from qwen2vl_trt.runtime.options import PipelineOptions
from qwen2vl_trt.runtime.pipeline import Pipeline
from qwen2vl_trt.runtime.scheduling.executor import SelfScheduling

from .finding import Finding
from .requests import GREEDY, requests

COMPARING = ("polygraphy", "sklearn", "torchvision")
"""The extra ``compare``, without which Transformers cannot be asked."""
_TOKENS = 32


def build_tiny(backend: str, precision: str, folder: Path, slots: int) -> Finding:
    """Build engines of the tiny model that take so many requests at a time."""
    profile = replace(usual_profile(TINY), max_num_seqs=slots)
    build_engines(resolve_model(TINY), *find_backend(backend, precision), profile, folder)
    return Finding("passed")


def compare_tiny(folder: Path, device: str) -> Finding:
    """An engine folder's tokens, embeddings and logits, within the tolerance of its precision."""
    engines = open_engines(folder, device)
    if all(map(find_spec, COMPARING)) and not isinstance(engines.runner, SelfScheduling):
        return _beside_transformers(engines)
    return _beside_torch(engines)


def _beside_transformers(engines: Engines) -> Finding:
    """As ``compare`` does, over fewer cases and, but where the tolerance needs it, without PyTorch's BF16."""
    from qwen2vl_trt.export.importable_torchvision import allow_torchvision

    allow_torchvision()
    from transformers.utils import logging

    from qwen2vl_trt.accuracy.comparison import compare_inputs, compare_runners
    from qwen2vl_trt.accuracy.engine_runner import EngineRunner
    from qwen2vl_trt.accuracy.inputs import TransformersProcessor, digit_cases, our_inputs
    from qwen2vl_trt.accuracy.transformers_runner import TransformersRunner

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    manifest, checkpoint = engines.manifest, engines.checkpoint
    config, tolerance, cases = checkpoint.config, tolerance_of(manifest.precision), digit_cases()[::2]
    settings = PipelineOptions().preprocessor_settings(checkpoint.folder, manifest.profile)
    settings = settings.narrowed(config.vision.patch_size)
    processor = TransformersProcessor(checkpoint.folder, settings, config.vision.qwen2_vl_dim)
    feeds = [processor(case, _TOKENS) for case in cases]
    transformers = [
        TransformersRunner(f"Transformers {dtype}", checkpoint, dtype, engines.device)
        for dtype in (torch.float32, torch.bfloat16)[: 1 if tolerance.baseline is None else 2]
    ]
    runners = [EngineRunner(manifest.backend, engines), *transformers[1:]]
    row, *baselines = compare_runners(transformers[0], runners, feeds, lambda name: None)
    outputs = compare_inputs(feeds, our_inputs(cases, checkpoint, settings, engines.device)).outputs | row.outputs
    compared = {name: baselines[0].outputs.get(name) if baselines else None for name in outputs}
    departures = [
        f"{name}: {why}" for name in outputs if (why := tolerance.departure(name, outputs[name], compared[name]))
    ]
    departures += [f"tokens: {why}"] if (why := tolerance.token_departure(row.agreement)) else []
    words = f"{row.agreement.agreeing} of {row.agreement.tokens} tokens of Transformers FP32"
    return _finding(departures, words, row.outputs[LOGITS].mean_relative, "mean error of logits")


def _beside_torch(engines: Engines) -> Finding:
    tolerance = tolerance_of(engines.manifest.precision, engines.manifest.precision)
    asked = requests(8)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny("torch", "fp32", Path(folder), 8)
        reference = Pipeline.from_engine_dir(folder, "cpu")
        pipeline = Pipeline(engines)
        expected, found = (
            [output.token_ids for output in each.generate(asked, GREEDY)] for each in (reference, pipeline)
        )
        images = [image for request in asked for image in request.images]
        outputs = {IMAGE_EMBEDS: (pipeline.embed_images(images), reference.embed_images(images))}
        if not isinstance(engines.runner, SelfScheduling):  # which shows nothing of its decoder
            outputs[HIDDEN_STATES] = pipeline.hidden_states(asked), reference.hidden_states(asked)
    figures = {name: measure(_array(ours), _array(theirs), name) for name, (ours, theirs) in outputs.items()}
    agreement = Agreement.of(*([token for answer in answers for token in answer] for answers in (found, expected)))
    departures = [f"{name}: {why}" for name in figures if (why := tolerance.departure(name, figures[name], None))]
    departures += [f"tokens: {why}"] if (why := tolerance.token_departure(agreement)) else []
    words = f"{agreement.agreeing} of {agreement.tokens} tokens of the torch backend in FP32"
    last = [*figures][-1]
    return _finding(departures, words, figures[last].mean_relative, f"mean error of {last}")


def _array(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(tensors).float().cpu().numpy()


def _finding(departures: list[str], words: str, value: float, unit: str) -> Finding:
    return Finding("failed" if departures else "passed", "; ".join([*departures, words]), value, unit)
