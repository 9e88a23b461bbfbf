"""Hugging Face Transformers as a Polygraphy runner: the reference, and PyTorch's own BF16 as the baseline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.errors import CheckpointError, EngineError
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.windows import window_layout

from .inputs import FORCED, MAX_TOKENS, grids, input_metadata
from .recorder import Recorder, decoder_modules, in_patch_order, vision_modules
from .tolerance import (
    DECODE_LOGITS,
    DECODER_PREFIX,
    GREEDY,
    HIDDEN_STATES,
    IMAGE_EMBEDS,
    LOGITS,
    PIXELS,
    TOKENS,
    VISION_PREFIX,
)

_MERGER = VISION_PREFIX + "merger"
_NORM = DECODER_PREFIX + "norm"


class TransformersRunner(BaseRunner):
    """``Qwen2_5_VLForConditionalGeneration.generate``, greedy or forced to take an answer; outputs are read by hooks.

    It is fed and answers as :class:`qwen2vl_trt.accuracy.engine_runner.EngineRunner`.
    """

    def __init__(
        self, name: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, layers: bool = False
    ) -> None:
        super().__init__(name=name)
        self._checkpoint, self._dtype, self._device, self._layers = checkpoint, dtype, device, layers

    def activate_impl(self) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        folder = self._checkpoint.folder
        try:
            model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=self._dtype, local_files_only=True
            )
            self._model = model.to(self._device).eval()
        except torch.OutOfMemoryError:
            raise EngineError(
                f"{self.name} does not fit the memory of {self._device}; --reference-device cpu"
            ) from None
        except Exception as error:  # Transformers has no common base for what it raises
            raise CheckpointError(f"{folder}: Transformers cannot load it: {' '.join(str(error).split())}") from None
        self._recorder, self._closing = Recorder(), ExitStack()
        tower, stack = self._model.model.visual, self._model.model.language_model
        modules = {_MERGER: tower.merger, _NORM: stack.norm}
        if self._layers:
            modules |= vision_modules(tower) | decoder_modules(stack)
        self._closing.enter_context(self._recorder.listen(modules))

    def deactivate_impl(self) -> None:
        self._closing.close()
        del self._model, self._recorder, self._closing

    def get_input_metadata_impl(self) -> TensorMetadata:
        return input_metadata(self._checkpoint.config.vision.qwen2_vl_dim)

    @torch.no_grad()
    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        feed = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed_dict.items()}
        self._recorder.clear()
        # FP32 is to mean FP32 in the patch embedding too.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), self._video_positions(feed):
            generated, length = self._generate(feed)
        logits = torch.cat(generated.logits).float()
        outputs = {LOGITS: logits[:1], GREEDY: generated.sequences[0, length:]}
        if len(logits) > 1:
            outputs[DECODE_LOGITS] = logits[1:]
        outputs |= self._recorded(feed)
        self.inference_time = time.perf_counter() - start
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def _generate(self, feed: Mapping[str, Tensor]) -> tuple[Any, int]:
        from transformers import LogitsProcessorList

        images, videos = grids(feed)
        tokens, forced = feed[TOKENS], feed[FORCED].tolist()
        patches = sum(t * h * w for t, h, w in images)
        inputs: dict[str, Tensor] = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
        config = self._checkpoint.config
        kinds = torch.zeros_like(tokens)
        if images:
            inputs |= {"pixel_values": feed[PIXELS][:patches], "image_grid_thw": feed["image_grid_thw"]}
            kinds[tokens == config.image_token_id] = 1
        if videos:
            inputs |= {
                "pixel_values_videos": feed[PIXELS][patches:],
                "video_grid_thw": feed["video_grid_thw"],
                "second_per_grid_ts": feed["second_per_grid_ts"],
            }
            kinds[tokens == config.video_token_id] = 2
        generated = self._model.generate(
            **{name: tensor.to(self._device) for name, tensor in inputs.items()},
            mm_token_type_ids=kinds[None].to(self._device),
            logits_processor=LogitsProcessorList([_Force(forced, len(tokens))] if forced else []),
            max_new_tokens=len(forced) or int(feed[MAX_TOKENS]),
            output_logits=True,  # as they are before the processors
            return_dict_in_generate=True,
            do_sample=False,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return generated, len(tokens)

    @contextmanager
    def _video_positions(self, feed: Mapping[str, Tensor]) -> Iterator[None]:
        """Give Transformers the positions of a prompt with a video, which its release 5 counts otherwise.

        :mod:`qwen2vl_trt.mrope` says how and why; without videos its own positions are used.
        """
        images, videos = grids(feed)
        if not videos:
            yield
            return
        seconds = feed["second_per_grid_ts"].tolist()
        positions, delta = rope_index(feed[TOKENS].tolist(), self._checkpoint.config, images, videos, seconds)
        given = positions[:, None].to(self._device), torch.tensor([[delta]], device=self._device)
        self._model.model.get_rope_index = lambda *arguments, **options: given
        try:
            yield
        finally:
            del self._model.model.get_rope_index  # the instance's: the class has its own

    def _recorded(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the decoder's modules the first call, the prompt; of the vision tower's those of images and of videos."""
        config = self._checkpoint.config.vision
        layouts = [window_layout(items, config) for items in grids(feed) if items]
        outputs = {}
        for name, calls in self._recorder.calls.items():
            if name.startswith(DECODER_PREFIX):
                outputs[HIDDEN_STATES if name == _NORM else name] = calls[0][0]
            elif name == VISION_PREFIX + "patch_embed":  # before the tower orders it by windows
                outputs[name] = torch.cat(calls)
            elif name == _MERGER:
                unit = config.merge_unit  # one row a merge group: repeated, it is in order as patches are
                rows = [call.repeat_interleave(unit, 0) for call in calls]
                ordered = [in_patch_order(row, layout, config)[::unit] for row, layout in zip(rows, layouts)]
                outputs[IMAGE_EMBEDS] = torch.cat(ordered)
            else:
                ordered = [in_patch_order(call, layout, config) for call, layout in zip(calls, layouts)]
                outputs[name] = torch.cat(ordered)
        return outputs


class _Force:
    """A logits processor that leaves one choice a step."""

    def __init__(self, token_ids: list[int], prompt: int) -> None:
        self._token_ids, self._prompt = token_ids, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self._token_ids[input_ids.shape[1] - self._prompt]] = 0
        return only
