"""An engine folder, on whatever backend, as a Polygraphy runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.runtime.backends import onnxruntime_runner, torch_runner
from qwen2vl_trt.runtime.backends.common import KVCache, graph_inputs
from qwen2vl_trt.runtime.backends.runners import DecoderRunner, Engines, VisionRunner
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.torch_runner import TorchDecoder, TorchVision
from qwen2vl_trt.runtime.generation_config import GenerationConfig
from qwen2vl_trt.tokenizer import load_tokenizer
from qwen2vl_trt.windows import WindowLayout, window_layout

from .inputs import FORCED, MAX_TOKENS, grids, input_metadata
from .recorder import Recorder, RecordingSession, decoder_modules, in_patch_order, marked_graph, pack, vision_modules
from .tolerance import DECODE_LOGITS, GREEDY, HIDDEN_STATES, IMAGE_EMBEDS, LOGITS, PIXELS, TOKENS, VISION_PREFIX

OnGraphInput = Callable[[str, dict[str, Tensor]], None]
"""Called with ``vision`` or ``decoder`` and the inputs of that graph before it runs."""


class EngineRunner(BaseRunner):
    """Vision engine, then decoder engine over the prompt and, token by token, over the answer: greedy, or forced.

    It is fed what :func:`qwen2vl_trt.accuracy.inputs.input_metadata` describes and gives ``image_embeds [T, C]``,
    ``hidden_states [S, C]``, ``logits [1, V]``, ``decode_logits [n - 1, V]``, ``greedy_ids [n]`` and, where asked for,
    every block (``layers``), all in FP32 and in Transformers' order. Engines are loaded while it is active.
    """

    def __init__(
        self, name: str, engines: Engines, layers: bool = False, on_graph_input: OnGraphInput | None = None
    ) -> None:
        super().__init__(name=name)
        self._engines, self._layers, self._on_graph_input = engines, layers, on_graph_input
        self._checkpoint, self._profile = engines.checkpoint, engines.manifest.profile
        self._device, self._dtype = engines.device, engines.dtype
        folder = engines.checkpoint.folder
        self._eos = GenerationConfig.from_folder(folder, load_tokenizer(folder)).eos_token_ids

    @property
    def _config(self) -> Qwen2VLConfig:
        return self._checkpoint.config

    @staticmethod
    def can_record(engines: Engines) -> bool:
        """Whether the blocks inside this backend's engines can be seen."""
        return engines.runner in (torch_runner, onnxruntime_runner)

    def _load(self) -> tuple[VisionRunner, DecoderRunner]:
        engines = replace(self._engines)  # its engines stay loaded as long as it is there
        if self._layers and engines.runner is onnxruntime_runner:
            vision = self._marked_session("vision", self._config.vision.depth, VISION_PREFIX)
            decoder = self._marked_session("decoder", self._config.text.num_hidden_layers, "")
            return onnxruntime_runner.load_vision(engines, vision), onnxruntime_runner.load_decoder(engines, decoder)
        return engines.vision, engines.decoder

    def activate_impl(self) -> None:
        self._recorder, self._closing = Recorder(), ExitStack()
        self._vision, self._decoder = self._load()
        if self._layers and isinstance(self._vision, TorchVision) and isinstance(self._decoder, TorchDecoder):
            self._closing.enter_context(self._recorder.listen(vision_modules(self._vision.module)))
            self._closing.enter_context(self._recorder.listen(decoder_modules(self._decoder.module.model)))

    def deactivate_impl(self) -> None:
        self._closing.close()
        del self._vision, self._decoder, self._recorder, self._closing

    def get_input_metadata_impl(self) -> TensorMetadata:
        return input_metadata(self._config.vision.qwen2_vl_dim)

    @torch.no_grad()
    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        feed = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed_dict.items()}
        self._recorder.clear()
        outputs: dict[str, Tensor] = {}
        embeds = self._embed_media(feed, outputs)
        self._decode(feed, embeds, outputs)
        self.inference_time = time.perf_counter() - start
        return {name: (t.float() if t.is_floating_point() else t).cpu().numpy() for name, t in outputs.items()}

    def _embed_media(self, feed: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> Tensor | None:
        """Frames that do not see each other, as many in a call as the engine takes."""
        frames = [(1, rows, columns) for items in grids(feed) for t, rows, columns in items for _ in range(t)]
        if not frames:
            return None
        limit, first = self._profile.max_batch_size, 0
        patches = feed[PIXELS].to(self._device, self._dtype)
        embeds, blocks = [], dict[str, list[Tensor]]()
        for start in range(0, len(frames), limit):
            layout = window_layout(tuple(frames[start : start + limit]), self._config.vision)
            count = int(layout.window_lengths.sum())
            packed = pack(patches[first : first + count], layout, self._config.vision)
            self._tell("vision", _vision_inputs(packed, layout))
            embeds.append(self._vision(packed, layout).clone())
            for name, (states,) in self._recorder.calls.items():
                blocks.setdefault(name, []).append(in_patch_order(states, layout, self._config.vision))
            self._recorder.clear()
            first += count
        outputs |= {name: torch.cat(parts) for name, parts in blocks.items()}
        outputs[IMAGE_EMBEDS] = torch.cat(embeds)
        return outputs[IMAGE_EMBEDS]

    def _decode(self, feed: Mapping[str, Tensor], embeds: Tensor | None, outputs: dict[str, Tensor]) -> None:
        token_ids, forced = feed[TOKENS].tolist(), feed[FORCED].tolist()
        images, videos = grids(feed)
        positions, delta = rope_index(token_ids, self._config, images, videos, feed["second_per_grid_ts"].tolist())
        inputs = self._decoder.embed(token_ids)
        if embeds is not None:  # images come first in it, then videos; among the tokens they may stand in any order
            image_tokens = sum(t * h * w for t, h, w in images) // self._config.vision.merge_unit
            parts = embeds.to(inputs.dtype).split([image_tokens, len(embeds) - image_tokens])
            for token, part in zip((self._config.image_token_id, self._config.video_token_id), parts):
                inputs[(feed[TOKENS] == token).to(inputs.device)] = part
        length = len(token_ids)
        self._decoder.cache.allot(1, length + (len(forced) or int(feed[MAX_TOKENS])))
        self._tell_decoder(inputs, positions, 0)
        step = self._decoder.step([Chunk(0, 0, length)], inputs, positions, hidden=True)
        assert step.hidden_states is not None
        outputs |= {name: calls[0].flatten(0, -2) for name, calls in self._recorder.calls.items()}
        outputs[HIDDEN_STATES] = step.hidden_states.clone()
        logits, answer = [step.logits.clone()], list[int]()
        while True:
            answer.append(forced[len(answer)] if forced else int(logits[-1].argmax()))
            if len(answer) == (len(forced) or int(feed[MAX_TOKENS])) or (not forced and answer[-1] in self._eos):
                break
            length = len(token_ids) + len(answer) - 1
            position, inputs = torch.full((3, 1), length + delta), self._decoder.embed(answer[-1:])
            if len(answer) == 1:
                self._tell_decoder(inputs, position, length)
            logits.append(self._decoder.step([Chunk(0, length, 1)], inputs, position).logits.clone())
        outputs[LOGITS], outputs[GREEDY] = logits[0], torch.tensor(answer)
        if len(logits) > 1:
            outputs[DECODE_LOGITS] = torch.cat(logits[1:])
        self._decoder.reset()

    def _tell(self, graph: str, inputs: dict[str, Tensor]) -> None:
        if self._on_graph_input is not None:
            self._on_graph_input(graph, inputs)

    def _tell_decoder(self, inputs_embeds: Tensor, position_ids: Tensor, start: int) -> None:
        """A decode step only where the cache can be read: not inside a backend that keeps its own."""
        cache = getattr(self._decoder, "cache", None)
        if self._on_graph_input is None or not isinstance(cache, KVCache):
            return
        chunk = Chunk(0, start, len(inputs_embeds))
        cache.reserve(chunk.end)
        k, v = cache.rows(0, 1)
        tensors = {
            **graph_inputs([chunk], inputs_embeds, position_ids),
            **{f"k_cache_{n}": tensor for n, tensor in enumerate(k)},
            **{f"v_cache_{n}": tensor for n, tensor in enumerate(v)},
        }
        if start == 0:  # what an earlier case left there is masked; no need to write it out
            tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "_cache_" in name}
        self._tell("decoder", tensors)

    def _marked_session(self, graph: str, blocks: int, prefix: str) -> ort.InferenceSession:
        path = self._engines.folder / f"{graph}.onnx"
        model, marked = marked_graph(path, blocks, prefix)
        session = onnxruntime_runner.open_session(path, self._device, model, fp8=self._engines.precision.fp8)
        return cast(ort.InferenceSession, RecordingSession(session, marked, self._recorder))


class ModulesRunner(EngineRunner):
    """Our PyTorch modules in FP32, with the limits of ``engines``."""

    def __init__(
        self, name: str, engines: Engines, checkpoint: Checkpoint, device: torch.device, layers: bool = False
    ) -> None:
        super().__init__(name, engines, layers)
        self._checkpoint, self._device, self._dtype = checkpoint, device, torch.float32

    def _load(self) -> tuple[VisionRunner, DecoderRunner]:
        vision = TorchVision(self._checkpoint, self._dtype, self._device)
        return vision, TorchDecoder(self._checkpoint, self._profile, self._dtype, self._device)


def _vision_inputs(pixel_values: Tensor, layout: WindowLayout) -> dict[str, Tensor]:
    fields: dict[str, Any] = {name: value for name, value in vars(layout).items() if isinstance(value, Tensor)}
    return {"pixel_values": pixel_values, **fields}
