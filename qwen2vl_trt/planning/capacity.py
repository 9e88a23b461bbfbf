"""How many GPUs a load needs: counts over the GPU's rates, divided by the fraction of a rate that is reached.

A group is ``tp_size`` GPUs that share one decoder; groups work side by side on different images. The vision tower is
small: every GPU of a group has the whole of it and embeds images of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.errors import PlanError

from . import counts
from .tables import Gpu

TP_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Assumptions:
    """What share of a rate is reached. The defaults are aims, not measurements.

    Attributes:
        vision: of the GPU's matrix-product rate, in the vision tower.
        prefill: likewise, in the decoder over prompts and where a large batch makes decoding arithmetic.
        decode: of the GPU's bandwidth, in decoding.
        tp: of twice the speed, for each doubling of ``tp_size``.
        reserve: of the memory, kept for activations, the runtime and fragmentation.
    """

    vision: float = 0.6
    prefill: float = 0.6
    decode: float = 0.8
    tp: float = 0.9
    reserve: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (0 < value <= 1 or (name == "reserve" and 0 <= value < 1)):
                raise PlanError(f"the {name} fraction is {value:g}; it must be above 0 and at most 1")
        if self.reserve == 1:
            raise PlanError("the reserve fraction is 1, which leaves no memory at all")


@dataclass(frozen=True)
class Load:
    """What has to be done.

    Attributes:
        rows, columns: patches of an image after resizing.
        text_tokens: of a prompt, the chat template's included.
        output_tokens: of an answer; 0 for vision features, which need no decoder.
        images_per_second: one image a request.
        max_seq_len: tokens that a slot of the cache holds; by default those of one request, up to a multiple of 64.
        max_num_seqs: most answers that a group decodes together.
    """

    rows: int
    columns: int
    text_tokens: int
    output_tokens: int
    images_per_second: float
    max_seq_len: int | None = None
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        if not (math.isfinite(self.images_per_second) and self.images_per_second > 0):
            raise PlanError(f"--images-per-second is {self.images_per_second:g}; it must be above 0")


@dataclass(frozen=True)
class Plan:
    """What one choice of ``tp_size`` gives. Seconds, bytes and rates are of one group unless said otherwise.

    Attributes:
        tp_size: GPUs of a group; ``groups``: how many the load needs.
        batch: answers decoded together; 0 without a decoder.
        weight_bytes: on each GPU, as ``kv_bytes_per_slot`` of one answer and ``kv_bytes`` of all slots.
        kv_available: what is left for them, on each GPU.
        prompt_tokens: of a request; ``slot_tokens``: capacity of a slot.
        vision_flops: of one image; ``prefill_flops``: of one prompt.
        step_bytes: read by one decode step, which gives every answer a token.
        images_per_second: of all groups.
    """

    tp_size: int
    groups: int
    batch: int
    weight_bytes: float
    kv_bytes_per_slot: float
    kv_bytes: float
    kv_available: float
    prompt_tokens: int
    slot_tokens: int
    vision_flops: counts.Flops
    prefill_flops: counts.Flops
    step_bytes: float
    step_flops: counts.Flops
    vision_seconds: float
    prefill_seconds: float
    step_seconds: float
    seconds_per_image: float
    images_per_second: float

    @property
    def gpus(self) -> int:
        return self.tp_size * self.groups

    @property
    def group_images_per_second(self) -> float:
        return 1 / self.seconds_per_image


def plan(
    config: Qwen2VLConfig,
    gpu: Gpu,
    load: Load,
    precision: str = "bf16",
    tp_size: int | None = None,
    assumptions: Assumptions = Assumptions(),
) -> Plan:
    """The plan with the fewest GPUs; of equals, the smallest groups.

    Args:
        precision: ``bf16``, or ``fp8`` for every matrix of the two engines except the embedding table and the output
            projection; the cache and the inside of attention stay in BF16. ``int8``, ``int4`` and ``nvfp4`` hold the
            weights of the decoder's layers, and everything is computed in BF16.
        tp_size: by default whatever of 1, 2, 4 and 8 needs fewest GPUs.

    Raises:
        PlanError: no FP8 on this GPU, heads that do not divide by ``tp_size``, or a model that does not fit.
    """
    if precision == "fp8" and gpu.fp8 is None:
        raise PlanError(f"{gpu.name} has no FP8; plan with --precision bf16")
    sizes = (tp_size,) if tp_size else TP_SIZES
    if load.output_tokens == 0:
        sizes = (tp_size or 1,)  # features need no decoder, and so no group
    plans, problems = [], []
    for size in sizes:
        try:
            plans.append(_plan_group(config, gpu, load, precision, size, assumptions))
        except PlanError as error:
            problems.append(str(error))
    if not plans:
        raise PlanError(
            problems[0]
            if tp_size
            else f"no plan for a group of 1, 2, 4 or 8 GPUs: {'; '.join(dict.fromkeys(problems))}"
        )
    return min(plans, key=lambda plan: (plan.gpus, plan.tp_size))


def _plan_group(
    config: Qwen2VLConfig, gpu: Gpu, load: Load, precision: str, tp_size: int, assumptions: Assumptions
) -> Plan:
    text, decodes = config.text, load.output_tokens > 0
    rate = gpu.fp8 if precision == "fp8" and gpu.fp8 else gpu.bf16
    weight_bytes = counts.LAYER_BYTES[precision]
    if decodes:
        _check_heads(text.num_attention_heads, text.num_key_value_heads, tp_size)
    prompt = counts.prompt_tokens(config, load.rows, load.columns, load.text_tokens)
    slot = load.max_seq_len or -(-(prompt + load.output_tokens) // 64) * 64
    if decodes and slot < prompt + load.output_tokens:
        raise PlanError(
            f"--max-seq-len {slot:,} is too small: the prompt has {prompt:,} tokens, its answer {load.output_tokens:,}"
        )

    decoder = counts.decoder_bytes(text, weight_bytes) / tp_size if decodes else 0
    weights = decoder + counts.vision_weights(config.vision) * (1 if precision == "fp8" else counts.BF16)
    available = gpu.memory * (1 - assumptions.reserve) - weights
    # More GPUs than key-value heads: each keeps one head, the same as some of its neighbours'.
    per_token = counts.kv_bytes_per_token(text) / min(tp_size, text.num_key_value_heads)
    per_slot = slot * per_token if decodes else 0.0
    if available < max(per_slot, 0):
        raise PlanError(
            f"tp_size {tp_size} does not fit: {weights / 1e9:,.1f} GB of weights a GPU and {per_slot / 1e9:,.2f} GB for"
            f" one answer's cache, of {gpu.memory * (1 - assumptions.reserve) / 1e9:,.1f} GB usable on {gpu.name}"
        )
    batch = min(load.max_num_seqs, int(available // per_slot)) if decodes else 0

    speed = tp_size * assumptions.tp ** math.log2(tp_size)  # of a group, in GPUs
    vision = counts.vision_flops(config.vision, load.rows, load.columns)
    vision_seconds = seconds(vision, rate, gpu.bf16) / assumptions.vision / tp_size
    prefill = counts.prefill_flops(text, prompt) if decodes else counts.Flops(0, 0)
    prefill_seconds = seconds(prefill, rate, gpu.bf16) / assumptions.prefill / speed
    step_bytes, step, step_seconds = 0.0, counts.Flops(0, 0), 0.0
    if decodes:
        context = prompt + load.output_tokens / 2  # on average over an answer
        kv_bytes = batch * context * per_token * tp_size
        step_bytes = counts.decode_weight_bytes(text, weight_bytes) + kv_bytes
        step = counts.decode_flops(text, batch, context)
        reading = step_bytes / gpu.bandwidth / assumptions.decode
        computing = seconds(step, rate, gpu.bf16) / assumptions.prefill
        step_seconds = max(reading, computing) / speed
    each = vision_seconds + prefill_seconds + (load.output_tokens * step_seconds / batch if decodes else 0)
    groups = max(1, math.ceil(load.images_per_second * each - 1e-9))
    return Plan(
        tp_size=tp_size,
        groups=groups,
        batch=batch,
        weight_bytes=weights,
        kv_bytes_per_slot=per_slot,
        kv_bytes=batch * per_slot,
        kv_available=available,
        prompt_tokens=prompt,
        slot_tokens=slot,
        vision_flops=vision,
        prefill_flops=prefill,
        step_bytes=step_bytes,
        step_flops=step,
        vision_seconds=vision_seconds,
        prefill_seconds=prefill_seconds,
        step_seconds=step_seconds,
        seconds_per_image=each,
        images_per_second=groups / each,
    )


def _check_heads(heads: int, kv_heads: int, tp_size: int) -> None:
    if heads % tp_size:
        raise PlanError(f"tp_size {tp_size} does not divide the decoder's {heads} attention heads")
    if kv_heads % tp_size and tp_size % kv_heads:
        raise PlanError(f"tp_size {tp_size} does not go with the decoder's {kv_heads} key-value heads")


def seconds(flops: counts.Flops, rate: float, attention_rate: float) -> float:
    """At full rate; what is inside attention has a rate of its own."""
    return flops.linear / rate + flops.attention / attention_rate
