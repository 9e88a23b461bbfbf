"""A plan's arithmetic, line by line, for people."""

from __future__ import annotations

from qwen2vl_trt.config import Qwen2VLConfig

from . import counts
from .capacity import Assumptions, Load, Plan, seconds
from .tables import Gpu


def arithmetic(
    config: Qwen2VLConfig, gpu: Gpu, load: Load, precision: str, assumptions: Assumptions, plan: Plan
) -> list[str]:
    """Every step from the counts to the number of GPUs, with the figures that went in and where they come from."""
    text, vision = config.text, config.vision
    rate, rate_name = (gpu.fp8, "fp8") if precision == "fp8" and gpu.fp8 else (gpu.bf16, "bf16")
    decodes = plan.batch > 0
    image_tokens = load.rows * load.columns // vision.merge_unit
    usable = gpu.memory * (1 - assumptions.reserve)
    speed = f"{plan.tp_size} GPUs x {assumptions.tp:g} a doubling" if plan.tp_size > 1 else "1 GPU"
    each = f" / {plan.tp_size} GPUs with an image each" if plan.tp_size > 1 else ""
    lines = [
        f"{gpu.name}, one GPU",
        f"  matrix products  {rate / 1e12:,.0f} TFLOP/s {rate_name.upper()}: {gpu.sources[rate_name]}",
        f"  bandwidth        {gpu.bandwidth / 1e12:,.2f} TB/s: {gpu.sources['bandwidth']}",
        f"  memory           {gpu.memory / 1e9:,.0f} GB x (1 - {assumptions.reserve:g} kept free) ="
        f" {usable / 1e9:,.1f} GB",
        "Fractions of these floors: assumptions unless you measured and passed your own",
        f"  vision {assumptions.vision:g}, prefill {assumptions.prefill:g}, decode {assumptions.decode:g},"
        f" tensor parallelism {assumptions.tp:g} a doubling",
        f"Vision tower, one image of {load.rows * vision.patch_size}x{load.columns * vision.patch_size}",
        f"  patches          {load.rows} x {load.columns} = {load.rows * load.columns:,}, tokens {image_tokens:,}",
        f"  operations       {plan.vision_flops.linear / 1e12:,.3f} linear +"
        f" {plan.vision_flops.attention / 1e12:,.3f} attention = {plan.vision_flops.total / 1e12:,.3f} TFLOP",
        f"  time             {_flop_time(plan.vision_flops, rate, gpu.bf16)} / {assumptions.vision:g}"
        f"{each} = {plan.vision_seconds * 1e3:,.2f} ms",
    ]
    if decodes:
        read = counts.decode_weight_bytes(text, 1 if precision == "fp8" else counts.BF16)
        computing = seconds(plan.step_flops, rate, gpu.bf16) / assumptions.prefill
        context = plan.prompt_tokens + load.output_tokens / 2
        lines += [
            "Prompt",
            f"  tokens           {load.text_tokens} text + {image_tokens:,} image + 2 = {plan.prompt_tokens:,}",
            f"  operations       {plan.prefill_flops.linear / 1e12:,.2f} linear +"
            f" {plan.prefill_flops.attention / 1e12:,.3f} attention = {plan.prefill_flops.total / 1e12:,.2f} TFLOP",
            f"  time             {_flop_time(plan.prefill_flops, rate, gpu.bf16)} / {assumptions.prefill:g} / ({speed})"
            f" = {plan.prefill_seconds * 1e3:,.2f} ms",
        ]
    lines += [
        "Memory, each GPU",
        f"  weights          {plan.weight_bytes / 1e9:,.2f} GB: {'a share of the decoder, and ' if decodes else ''}"
        "the whole vision tower",
    ]
    if decodes:
        replicas = max(1, plan.tp_size // text.num_key_value_heads)
        lines += [
            f"  cache, a token   2 x {text.num_hidden_layers} layers x {text.num_key_value_heads} heads x"
            f" {text.head_dim} x {counts.BF16} bytes = {counts.kv_bytes_per_token(text):,} bytes"
            + (f", {replicas} copies" if replicas > 1 else "")
            + f", over {plan.tp_size} GPUs",
            f"  cache, an answer {plan.slot_tokens:,} tokens = {plan.kv_bytes_per_slot / 1e9:,.3f} GB",
            f"  batch            min({load.max_batch_size}, {plan.kv_room / 1e9:,.1f} GB left /"
            f" {plan.kv_bytes_per_slot / 1e9:,.3f} GB) = {plan.batch}, cache {plan.kv_bytes / 1e9:,.1f} GB",
            "Decode, one token of every answer of the batch",
            f"  bytes            {read / 1e9:,.1f} GB weights + {plan.batch} x {context:,.0f} tokens of cache ="
            f" {plan.step_bytes / 1e9:,.1f} GB",
            f"  reading          {plan.step_bytes / 1e9:,.1f} GB / {gpu.bandwidth / 1e12:,.2f} TB/s /"
            f" {assumptions.decode:g} = {plan.step_bytes / gpu.bandwidth / assumptions.decode * 1e3:,.2f} ms",
            f"  computing        {plan.step_flops.total / 1e12:,.2f} TFLOP:"
            f" {_flop_time(plan.step_flops, rate, gpu.bf16)} / {assumptions.prefill:g} ="
            f" {computing * 1e3:,.2f} ms",
            f"  step             the longer / ({speed}) = {plan.step_seconds * 1e3:,.2f} ms,"
            f" {plan.batch / plan.step_seconds:,.0f} tokens/s",
        ]
    parts = f"{plan.vision_seconds * 1e3:,.2f}"
    if decodes:
        decode = f"{load.output_tokens} x {plan.step_seconds * 1e3:,.2f} / {plan.batch}"
        parts = f"{parts} + {plan.prefill_seconds * 1e3:,.2f} + {decode} = {plan.seconds_per_image * 1e3:,.2f}"
    group, rate_of_group = "one GPU", f"{plan.group_images_per_second:,.2f} images/s"
    if plan.tp_size > 1:
        group = f"a group of {plan.tp_size} GPUs"
    return [
        *lines,
        f"Together, {group}",
        f"  an image         {parts} ms, {rate_of_group}",
        f"  groups           {load.images_per_second:,.10g} / {rate_of_group}, rounded up = {plan.groups:,}",
    ]


def _flop_time(flops: counts.Flops, rate: float, attention_rate: float) -> str:
    if rate == attention_rate:
        return f"{flops.total / 1e12:,.3f} TFLOP / {rate / 1e12:,.0f} TFLOP/s"
    return (
        f"({flops.linear / 1e12:,.3f} / {rate / 1e12:,.0f} + {flops.attention / 1e12:,.3f} /"
        f" {attention_rate / 1e12:,.0f} TFLOP/s)"
    )


def summary(gpu: Gpu, load: Load, precision: str, plan: Plan) -> str:
    """The answer in one line."""
    decoding = (
        f", batch {plan.batch}, {plan.kv_bytes / 1e9:,.1f} GB of key-value cache a GPU,"
        f" {plan.step_seconds * 1e3:,.1f} ms a token"
        if plan.batch
        else ", no decoder"
    )
    return (
        f"{plan.gpus:,} x {gpu.name}: {plan.groups:,} x tp_size {plan.tp_size}, {precision}{decoding},"
        f" {plan.images_per_second:,.1f} images/s expected"
    )
