"""A plan's arithmetic, line by line, for people."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_trt.config import Qwen2VLConfig

from . import counts
from .capacity import Assumptions, Load, Plan, seconds
from .tables import Gpu


def arithmetic(
    config: Qwen2VLConfig, gpu: Gpu, load: Load, precision: str, assumptions: Assumptions, plan: Plan
) -> list[str]:
    """Every step from the counts to the number of GPUs, with the figures that went in and where they come from."""
    text = _Arithmetic(config, gpu, load, precision, assumptions, plan)
    decoder = (text.prompt, text.weights, text.cache, text.decode) if plan.batch else (text.weights,)
    sections = (text.rates, text.vision, *decoder, text.together)
    return [line for section in sections for line in section()]


@dataclass(frozen=True)
class _Arithmetic:
    """The sections of the answer, each a heading and its lines; an operation's rate is that of the plan's precision."""

    config: Qwen2VLConfig
    gpu: Gpu
    load: Load
    precision: str
    assumptions: Assumptions
    plan: Plan

    @property
    def _name(self) -> str:
        return "fp8" if self.precision == "fp8" and self.gpu.fp8 else "bf16"

    @property
    def _rate(self) -> float:
        return getattr(self.gpu, self._name)

    @property
    def _image_tokens(self) -> int:
        return self.load.rows * self.load.columns // self.config.vision.merge_unit

    @property
    def _speed(self) -> str:
        """Of a group."""
        return f"{self.plan.tp_size} GPUs x {self.assumptions.tp:g} a doubling" if self.plan.tp_size > 1 else "1 GPU"

    def rates(self) -> list[str]:
        gpu, assumptions = self.gpu, self.assumptions
        return [
            f"{gpu.name}, one GPU",
            f"  matrix products  {self._rate / 1e12:,.0f} TFLOP/s {self._name.upper()}: {gpu.sources[self._name]}",
            f"  bandwidth        {gpu.bandwidth / 1e12:,.2f} TB/s: {gpu.sources['bandwidth']}",
            f"  memory           {gpu.memory / 1e9:,.0f} GB x (1 - {assumptions.reserve:g} kept free) ="
            f" {gpu.memory * (1 - assumptions.reserve) / 1e9:,.1f} GB",
            "Fractions of these rates: assumptions unless you measured and passed your own",
            f"  vision {assumptions.vision:g}, prefill {assumptions.prefill:g}, decode {assumptions.decode:g},"
            f" tensor parallelism {assumptions.tp:g} a doubling",
        ]

    def vision(self) -> list[str]:
        load, plan, patch = self.load, self.plan, self.config.vision.patch_size
        each = f" / {plan.tp_size} GPUs with an image each" if plan.tp_size > 1 else ""
        return [
            f"Vision tower, one image of {load.rows * patch}x{load.columns * patch}",
            f"  patches          {load.rows} x {load.columns} = {load.rows * load.columns:,}, tokens"
            f" {self._image_tokens:,}",
            f"  operations       {plan.vision_flops.linear / 1e12:,.3f} linear +"
            f" {plan.vision_flops.attention / 1e12:,.3f} attention = {plan.vision_flops.total / 1e12:,.3f} TFLOP",
            f"  time             {self._time_of(plan.vision_flops)} / {self.assumptions.vision:g}{each} ="
            f" {plan.vision_seconds * 1e3:,.2f} ms",
        ]

    def prompt(self) -> list[str]:
        plan = self.plan
        return [
            "Prompt",
            f"  tokens           {self.load.text_tokens} text + {self._image_tokens:,} image + 2 ="
            f" {plan.prompt_tokens:,}",
            f"  operations       {plan.prefill_flops.linear / 1e12:,.2f} linear +"
            f" {plan.prefill_flops.attention / 1e12:,.3f} attention = {plan.prefill_flops.total / 1e12:,.2f} TFLOP",
            f"  time             {self._time_of(plan.prefill_flops)} / {self.assumptions.prefill:g} / ({self._speed})"
            f" = {plan.prefill_seconds * 1e3:,.2f} ms",
        ]

    def weights(self) -> list[str]:
        share = "a share of the decoder, and " if self.plan.batch else ""
        return [
            "Memory, each GPU",
            f"  weights          {self.plan.weight_bytes / 1e9:,.2f} GB: {share}the whole vision tower",
        ]

    def cache(self) -> list[str]:
        text, plan = self.config.text, self.plan
        replicas = max(1, plan.tp_size // text.num_key_value_heads)
        return [
            f"  cache, a token   2 x {text.num_hidden_layers} layers x {text.num_key_value_heads} heads x"
            f" {text.head_dim} x {counts.BF16} bytes = {counts.kv_bytes_per_token(text):,} bytes"
            + (f", {replicas} copies" if replicas > 1 else "")
            + f", over {plan.tp_size} GPUs",
            f"  cache, an answer {plan.slot_tokens:,} tokens = {plan.kv_bytes_per_slot / 1e9:,.3f} GB",
            f"  batch            min({self.load.max_num_seqs}, {plan.kv_available / 1e9:,.1f} GB left /"
            f" {plan.kv_bytes_per_slot / 1e9:,.3f} GB) = {plan.batch}, cache {plan.kv_bytes / 1e9:,.1f} GB",
        ]

    def decode(self) -> list[str]:
        gpu, plan, assumptions = self.gpu, self.plan, self.assumptions
        read = counts.decode_weight_bytes(self.config.text, counts.LAYER_BYTES[self.precision])
        computing = seconds(plan.step_flops, self._rate, gpu.bf16) / assumptions.prefill
        context = plan.prompt_tokens + self.load.output_tokens / 2
        return [
            "Decode, one token of every answer of the batch",
            f"  bytes            {read / 1e9:,.1f} GB weights + {plan.batch} x {context:,.0f} tokens of cache ="
            f" {plan.step_bytes / 1e9:,.1f} GB",
            f"  reading          {plan.step_bytes / 1e9:,.1f} GB / {gpu.bandwidth / 1e12:,.2f} TB/s /"
            f" {assumptions.decode:g} = {plan.step_bytes / gpu.bandwidth / assumptions.decode * 1e3:,.2f} ms",
            f"  computing        {plan.step_flops.total / 1e12:,.2f} TFLOP:"
            f" {self._time_of(plan.step_flops)} / {assumptions.prefill:g} = {computing * 1e3:,.2f} ms",
            f"  step             the longer / ({self._speed}) = {plan.step_seconds * 1e3:,.2f} ms,"
            f" {plan.batch / plan.step_seconds:,.0f} tokens/s",
        ]

    def together(self) -> list[str]:
        load, plan = self.load, self.plan
        parts = f"{plan.vision_seconds * 1e3:,.2f}"
        if plan.batch:
            decode = f"{load.output_tokens} x {plan.step_seconds * 1e3:,.2f} / {plan.batch}"
            parts = f"{parts} + {plan.prefill_seconds * 1e3:,.2f} + {decode} = {plan.seconds_per_image * 1e3:,.2f}"
        group = f"a group of {plan.tp_size} GPUs" if plan.tp_size > 1 else "one GPU"
        rate = f"{plan.group_images_per_second:,.2f} images/s"
        return [
            f"Together, {group}",
            f"  an image         {parts} ms, {rate}",
            f"  groups           {load.images_per_second:,.10g} / {rate}, rounded up = {plan.groups:,}",
        ]

    def _time_of(self, flops: counts.Flops) -> str:
        if self._rate == self.gpu.bf16:
            return f"{flops.total / 1e12:,.3f} TFLOP / {self._rate / 1e12:,.0f} TFLOP/s"
        return (
            f"({flops.linear / 1e12:,.3f} / {self._rate / 1e12:,.0f} + {flops.attention / 1e12:,.3f} /"
            f" {self.gpu.bf16 / 1e12:,.0f} TFLOP/s)"
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
