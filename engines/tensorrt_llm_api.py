"""Every call of TensorRT-LLM's API, and a check that the installed release still has it.

Only documented names are used: https://nvidia.github.io/TensorRT-LLM/llm-api/reference.html and the reference files of
``tests/unittest/api_stability`` in its repository, where ``PreprocessedInputs`` alone is a prototype. That takes token
ids, M-RoPE positions and embeddings; releases without it run their own vision tower. ``multi_modal_embeddings`` of a
prompt guesses the grid from the number of tokens, so that M-RoPE would be wrong for most images.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen2vl_trt.errors import EngineError

MODULE = "tensorrt_llm"
EMBEDDINGS, OWN = "embeddings", "own"

_LLM = ("model", "tensor_parallel_size", "dtype")
_LLM_ARGS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "kv_cache_config")
_GENERATE_ASYNC = ("inputs", "sampling_params", "streaming", "cache_salt")
_SAMPLING = (
    "max_tokens",
    "end_id",
    "pad_id",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "temperature",
    "top_k",
    "top_p",
    "detokenize",
)
_KV_CACHE = ("enable_block_reuse", "free_gpu_memory_fraction")
_REQUEST_OUTPUT = ("outputs", "finished", "prompt_token_ids", "abort", "__aiter__")
_COMPLETION_OUTPUT = ("token_ids", "finish_reason", "stop_reason")


def check_api(module: Any) -> None:
    """Refuse a release whose API differs from the one that is relied on, naming the differences.

    Raises:
        EngineError: it does.
    """
    differing = differences(module)
    if differing:
        raise EngineError(
            f"{MODULE} {module.__version__} lacks what this release relies on: {'; '.join(differing)}. Install another"
            " release."
        )


def differences(module: Any) -> list[str]:
    """What of the API that is relied on the package lacks, in words; empty where all is there."""
    found: list[str] = []
    llm, params, llmapi = (_get(module, name, found) for name in ("LLM", "SamplingParams", "llmapi"))
    if llm is not None:
        init = inspect.signature(llm.__init__).parameters
        _compare("LLM.__init__", _LLM, init, found)
        takes_more = any(p.kind is p.VAR_KEYWORD for p in init.values())
        arguments = getattr(llmapi, "TorchLlmArgs", None) if takes_more else None
        _compare("LLM.__init__", _LLM_ARGS, {**init, **getattr(arguments, "model_fields", {})}, found)
        generate = getattr(llm, "generate_async", None)
        _compare("LLM.generate_async", _GENERATE_ASYNC, _parameters(generate), found)
    if params is not None:
        _compare("SamplingParams", _SAMPLING, _parameters(params), found)
    if llmapi is not None:
        for name, wanted in (("KvCacheConfig", _KV_CACHE), ("CompletionOutput", _COMPLETION_OUTPUT)):
            _compare(name, wanted, _parameters(getattr(llmapi, name, None)), found)
        _compare("RequestOutput", _REQUEST_OUTPUT, dir(getattr(llmapi, "RequestOutput", None)), found)
    return found


def _get(module: Any, name: str, found: list[str]) -> Any:
    value = getattr(module, name, None)
    if value is None:
        found.append(name)
    return value


def _parameters(callable_: Any) -> Any:
    if callable_ is None:
        return ()
    try:
        return inspect.signature(callable_).parameters
    except ValueError:  # bound from C++: its attributes are all that can be seen
        return dir(callable_)


def _compare(owner: str, wanted: Sequence[str], there: Any, found: list[str]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        found.append(f"{owner} without {', '.join(missing)}")


def vision_input() -> str:
    """``"embeddings"`` where the installed release takes those of another vision engine, else ``"own"``: its own."""
    try:
        llm = import_module(f"{MODULE}.llmapi.llm")
        multimodal = import_module(f"{MODULE}.inputs.multimodal")
    except ImportError:
        return OWN
    inputs, params = getattr(llm, "PreprocessedInputs", None), getattr(multimodal, "MultimodalParams", None)
    there = {"prompt_token_ids", "multimodal_params"} <= set(_parameters(inputs))
    there &= "multimodal_data" in _parameters(params) and hasattr(params, "to_handle")
    return EMBEDDINGS if there else OWN


def make_llm(
    folder: Path,
    tp_size: int,
    dtype: torch.dtype,
    max_num_seqs: int,
    max_input_len: int,
    max_seq_len: int,
    max_num_tokens: int,
    reuse_blocks: bool,
    memory_fraction: float,
) -> Any:
    """A ``tensorrt_llm.LLM`` of a checkpoint, on the first ``tp_size`` GPUs; FP8 where the checkpoint is.

    Args:
        reuse_blocks: keep keys and values of ended requests for prompts that begin alike.
        memory_fraction: of the memory that the weights leave free, for the paged key-value cache.
    """
    module = import_module(MODULE)
    cache = module.llmapi.KvCacheConfig(enable_block_reuse=reuse_blocks, free_gpu_memory_fraction=memory_fraction)
    return module.LLM(
        model=str(folder),
        tensor_parallel_size=tp_size,
        dtype=str(dtype).removeprefix("torch."),
        max_batch_size=max_num_seqs,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        kv_cache_config=cache,
    )


def sampling_params(
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    ignore_eos: bool,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    stop_token_ids: Sequence[int] = (),
) -> Any:
    """Its ``SamplingParams``; the answer keeps its end-of-sequence token, whichever of them it is.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: 0 keeps all tokens.
        stop_token_ids: end the answer too, with ``ignore_eos`` as well.
    """
    # top_k=1 is greedy in every release; a temperature of 0 is not.
    choice = {"top_k": 1} if temperature == 0 else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return import_module(MODULE).SamplingParams(
        max_tokens=max_tokens,
        end_id=eos_token_ids[0],
        pad_id=pad_token_id,
        stop_token_ids=[*stop_token_ids, *(() if ignore_eos else eos_token_ids[1:])] or None,
        include_stop_str_in_output=True,
        ignore_eos=ignore_eos,
        detokenize=False,
        **choice,
    )


def embedding_inputs(token_ids: list[int], embeds: Tensor, seen: Tensor, mrope: dict[str, Tensor]) -> Any:
    """A prompt with its embeddings, as its own input processor would make it.

    Args:
        token_ids: S of them, vision tokens expanded.
        embeds: ``[T, C]`` of the T vision tokens, in the order of the prompt; T may be 0.
        seen: ``[S]`` int64, how many vision tokens there are up to each token, that one included.
        mrope: see :func:`qwen2vl_trt.mrope.mrope_config`.
    """
    data: dict[str, Any] = {"mrope_config": mrope}
    if len(embeds):
        # On the host: each process of a tensor-parallel group copies them to its own GPU.
        data |= {"multimodal_embedding": embeds.cpu(), "multimodal_embed_mask_cumsum": seen}
    params = import_module(f"{MODULE}.inputs.multimodal").MultimodalParams(multimodal_data=data)
    params.to_handle("multimodal_data")  # shared memory: its workers are other processes
    return import_module(f"{MODULE}.llmapi.llm").PreprocessedInputs(
        prompt_token_ids=token_ids, multimodal_params=params
    )


def pixel_inputs(text: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """A prompt for its own tokenizer and vision tower: the rendered chat template, one vision token an image."""
    return {"prompt": text, "multi_modal_data": {"image": list(images)}} if images else {"prompt": text}


@dataclass(frozen=True)
class Progress:
    """What one request has so far.

    Attributes:
        prompt_token_ids: as TensorRT-LLM read the prompt.
        token_ids: of the answer, all of them.
        finish_reason: ``"stop"``, ``"length"``, ``"timeout"``, ``"cancelled"``, or None while it runs.
        stop_reason: the stop token that ended it, where it was not ``end_id``.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None


async def generate(llm: Any, inputs: Any, params: Any, salt: str | None) -> AsyncIterator[Progress]:
    """Run one request; cancelling the task that iterates aborts it. Prompts of one ``salt`` share key-value blocks."""
    result = llm.generate_async(inputs, params, streaming=True, cache_salt=salt)
    ended = False
    try:
        async for output in result:
            answer = output.outputs[0]
            ended = output.finished
            yield Progress(
                list(output.prompt_token_ids), list(answer.token_ids), answer.finish_reason, answer.stop_reason
            )
    finally:
        if not ended:
            result.abort()
