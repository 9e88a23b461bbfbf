import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen2vl_trt.checkpoint import Checkpoint
from qwen2vl_trt.engines.profile import BuildProfile
from qwen2vl_trt.mrope import rope_index
from qwen2vl_trt.runtime.backends.steps import Chunk
from qwen2vl_trt.runtime.backends.torch_runner import TorchDecoder

from ..inputs.multimodal import MultimodalParams


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: list[str] | str | None = None
    bad_token_ids: list[int] | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    logits_processor: Any = None
    apply_batched_logits_processor: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width_array: list[int] | None = None
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    return_log_probs: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[str] | None = None
    lookahead_config: Any = None
    guided_decoding: Any = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class KvCacheConfig:
    def __init__(
        self,
        *,
        enable_block_reuse: bool = True,
        max_tokens: int | None = None,
        max_attention_window: list[int] | None = None,
        sink_token_length: int | None = None,
        free_gpu_memory_fraction: float | None = 0.9,
        host_cache_size: int | None = None,
        dtype: str = "auto",
        tokens_per_block: int = 32,
    ) -> None:
        self.enable_block_reuse, self.free_gpu_memory_fraction = enable_block_reuse, free_gpu_memory_fraction


class TorchLlmArgs:
    model_fields = dict.fromkeys(
        (
            "model",
            "tensor_parallel_size",
            "dtype",
            "pipeline_parallel_size",
            "max_batch_size",
            "max_input_len",
            "max_seq_len",
            "max_num_tokens",
            "kv_cache_config",
            "enable_chunked_prefill",
            "stream_interval",
            "cuda_graph_config",
        )
    )


@dataclass
class PreprocessedInputs:
    prompt_token_ids: list[int]
    query_token_ids: list[int] | None = None
    multimodal_params: MultimodalParams | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] | None = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Any = None
    prompt_logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None


class RequestOutput:
    def __init__(self, prompt_token_ids):
        self._prompt_token_ids, self._outputs, self._done, self.aborted = (
            prompt_token_ids,
            [CompletionOutput(0)],
            False,
            0,
        )
        self._responses: asyncio.Queue = asyncio.Queue()

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._prompt_token_ids

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self._outputs

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self.aborted += 1

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._done:
            raise StopAsyncIteration
        response = await self._responses.get()
        if isinstance(response, Exception):
            raise response
        answer = self._outputs[0]
        answer.token_ids, answer.finish_reason, answer.stop_reason = response
        self._done = answer.finish_reason is not None
        return self


class LLM:
    made: list["LLM"] = []  # noqa: RUF012
    keeps_end_id = True
    fails_at: int | None = None  # the request that fails in the engine, from 0

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in TorchLlmArgs.model_fields:
                raise ValueError(f"LLM got invalid argument: {name}")
        self.arguments = {"tensor_parallel_size": tensor_parallel_size, "dtype": dtype, **kwargs}
        self.folder, self.checkpoint = Path(model), Checkpoint(Path(model))
        limits = {name: kwargs[name] for name in ("max_input_len", "max_seq_len")}
        limits["max_num_seqs"] = kwargs["max_batch_size"]
        self._decoder = TorchDecoder(
            self.checkpoint, BuildProfile(**limits), getattr(torch, dtype), torch.device("cpu")
        )
        self._free = list(range(kwargs["max_batch_size"]))
        self._blocks: dict[Any, torch.Tensor] = {}
        self.requests: list[tuple[Any, SamplingParams, str | None, RequestOutput]] = []
        self.most_together = 0
        LLM.made.append(self)

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Mapping[str, str] | None = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        assert streaming
        assert sampling_params.end_id is not None
        made = self._pixels(**inputs) if isinstance(inputs, dict) else self._embeddings(inputs)
        token_ids, embeds, positions, delta = made
        if len(token_ids) > self.arguments["max_num_tokens"]:
            raise ValueError("The sum of prompt length should not exceed max_num_tokens")
        if self.arguments["kv_cache_config"].enable_block_reuse:
            # Blocks are found by salt and token ids, whatever the embeddings.
            embeds = self._blocks.setdefault((cache_salt, tuple(token_ids)), embeds)
        result = RequestOutput(token_ids)
        number = len(self.requests)
        self.requests.append((inputs, sampling_params, cache_salt, result))
        loop = asyncio.get_running_loop()  # an iteration with `async for` needs one
        result.task = loop.create_task(self._run(number, result, embeds, positions, delta, sampling_params))
        return result

    def _embeddings(self, inputs):
        params = inputs.multimodal_params
        params.to_tensor("multimodal_data")
        data = params.multimodal_data
        mrope, embeds = data["mrope_config"], data.get("multimodal_embedding")
        positions, deltas = mrope["mrope_position_ids"], mrope["mrope_position_deltas"]
        assert positions.shape == (3, 1, len(inputs.prompt_token_ids))
        assert (deltas.shape, deltas.dtype) == ((1, 1), torch.int32)
        if embeds is not None:
            is_vision = torch.isin(torch.tensor(inputs.prompt_token_ids), torch.tensor(self._vision_ids()))
            assert torch.equal(data["multimodal_embed_mask_cumsum"], is_vision.cumsum(0))
        return inputs.prompt_token_ids, self._fused(inputs.prompt_token_ids, embeds), positions, int(deltas)

    def _pixels(self, prompt, multi_modal_data=None):
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        images = (multi_modal_data or {}).get("image")
        read = AutoProcessor.from_pretrained(self.folder)(text=[prompt], images=images, return_tensors="pt")
        token_ids, embeds, grids = read["input_ids"][0].tolist(), None, []
        if images:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.folder, dtype=torch.bfloat16)
            with torch.no_grad():
                made = model.model.get_image_features(read["pixel_values"].bfloat16(), read["image_grid_thw"])
            made = getattr(made, "pooler_output", made)
            embeds = torch.cat(list(made)) if isinstance(made, (list, tuple)) else made
            grids = [tuple(grid) for grid in read["image_grid_thw"].tolist()]
        positions, delta = rope_index(token_ids, self.checkpoint.config, grids)
        return token_ids, self._fused(token_ids, embeds), positions[:, None], delta

    def _vision_ids(self):
        return [self.checkpoint.config.image_token_id, self.checkpoint.config.video_token_id]

    def _fused(self, token_ids, embeds):
        rows = self._decoder.embed(token_ids)
        if embeds is not None:
            rows[torch.isin(torch.tensor(token_ids), torch.tensor(self._vision_ids()))] = embeds.to(rows.dtype)
        return rows

    async def _run(self, number, result, embeds, positions, delta, params):
        while not self._free:
            await asyncio.sleep(0)
        slot = self._free.pop(0)
        try:
            self.most_together = max(self.most_together, self.arguments["max_batch_size"] - len(self._free))
            if number == self.fails_at:
                raise RuntimeError("CUDA error: an illegal\nmemory access")
            await self._decode(slot, result, embeds, positions, delta, params)
        except Exception as error:
            result._responses.put_nowait(error)
        finally:
            self._free.append(slot)

    async def _decode(self, slot, result, embeds, positions, delta, params):
        logits = self._decoder.step([Chunk(slot, 0, len(embeds))], embeds, positions[:, 0]).logits[0]
        held, tokens = len(embeds), []
        stops = {} if params.ignore_eos else dict.fromkeys(params.stop_token_ids or [])
        while not result.aborted:
            token = int(logits.argmax()) if params.top_k == 1 else int(_drawn(logits, params))
            tokens.append(token)
            ended = not params.ignore_eos and token == params.end_id
            if ended and not self.keeps_end_id:
                tokens.pop()
            if token in stops and not params.include_stop_str_in_output:
                tokens.pop()
            reason = "stop" if ended or token in stops else "length" if len(tokens) >= params.max_tokens else None
            result._responses.put_nowait((list(tokens), reason, token if token in stops else None))
            if reason:
                return
            await asyncio.sleep(0)
            position = torch.full((3, 1), held + delta)
            logits = self._decoder.step([Chunk(slot, held, 1)], self._decoder.embed([token]), position).logits[0]
            held += 1


def _drawn(logits, params):
    likely = torch.softmax(logits / params.temperature, -1)
    if params.top_k:
        likely[likely < likely.topk(params.top_k).values[-1]] = 0
    return torch.multinomial(likely, 1)
