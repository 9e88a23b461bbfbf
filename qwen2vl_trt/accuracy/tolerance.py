"""What may depart, and by how much, in each precision; docs/guide/accuracy.md gives the reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from qwen2vl_trt.errors import LimitError

from .figures import Agreement, Figures

IMAGE_EMBEDS, HIDDEN_STATES, LOGITS, DECODE_LOGITS = "image_embeds", "hidden_states", "logits", "decode_logits"
GREEDY = "greedy_ids"
PIXELS, TOKENS = "pixel_values", "input_ids"
VISION_PREFIX, DECODER_PREFIX = "visual.", "model."
"""Of the blocks' names, which are the checkpoint's."""


@dataclass(frozen=True)
class Tolerance:
    """The limits; None is no limit. Errors are those of :class:`qwen2vl_trt.accuracy.figures.Figures`.

    Attributes:
        pixels: largest difference of a normalised pixel: two levels of 255. They are bit for bit the same on a CPU; a
            resize on a GPU rounds in another order.
        embeddings: largest maximum relative error of the vision embeddings, and of each vision block.
        hidden_states: the same of the decoder's hidden states, and of each of its layers.
        logits: the same of all logits.
        vision_cosine: smallest cosine of the vision embeddings and of each vision block.
        decoder_cosine: the same of the hidden states, each decoder layer and the logits.
        baseline: largest mean relative error of embeddings, hidden states and each block, in multiples of that of
            PyTorch's own BF16.
        logits_baseline: the same of the logits.
        tokens: smallest share of greedy tokens that agree.
    """

    pixels: float | None = 2.01 / 255 / 0.26
    embeddings: float | None = None
    hidden_states: float | None = None
    logits: float | None = None
    vision_cosine: float | None = None
    decoder_cosine: float | None = None
    baseline: float | None = None
    logits_baseline: float | None = None
    tokens: float | None = None

    def departure(self, name: str, found: Figures, baseline: Figures | None) -> str | None:
        """What of an output is over the limits, in words; None where nothing is.

        Args:
            name: of the output: one of those above, or of a block.
            found: its figures.
            baseline: PyTorch's BF16's figures for it.
        """
        if not math.isfinite(found.max_absolute):
            return "holds values that are not finite"
        if name in (PIXELS, TOKENS):
            over = self.pixels is not None and name == PIXELS and not found.max_absolute <= self.pixels
            wrong = name == TOKENS and found.max_absolute > 0
            return f"differs by {found.max_absolute:.2e} from Transformers' processor" if over or wrong else None
        vision = name == IMAGE_EMBEDS or name.startswith(VISION_PREFIX)
        logits = name in (LOGITS, DECODE_LOGITS)
        largest = self.embeddings if vision else self.logits if logits else self.hidden_states
        if largest is not None and not found.max_relative <= largest:
            return f"maximum relative error {found.max_relative:.2e} is over {largest:.0e}"
        smallest = self.vision_cosine if vision else self.decoder_cosine
        if smallest is not None and not found.cosine >= smallest:
            return f"cosine {found.cosine:.6f} is below {smallest}"
        times = self.logits_baseline if logits else self.baseline
        if times is not None and baseline is not None and not found.mean_relative <= times * baseline.mean_relative:
            return (
                f"mean relative error {found.mean_relative:.2e} is over {times:g} times that of PyTorch's BF16,"
                f" {baseline.mean_relative:.2e}"
            )
        return None

    def token_departure(self, found: Agreement) -> str | None:
        """The same of greedy tokens."""
        if self.tokens is None or found.agreeing >= self.tokens * found.tokens:
            return None
        return f"{found.agreeing} of {found.tokens} agree, fewer than {self.tokens:.0%}"

    def override(self, settings: Sequence[str]) -> Tolerance:
        """Apply ``NAME=VALUE`` settings; ``none`` takes a limit away.

        Raises:
            LimitError: an unknown name, or no number.
        """
        known = [field.name for field in fields(self)]
        changes: dict[str, float | None] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            name = name.replace("-", "_")
            if name not in known:
                raise LimitError(f"--tolerance {setting}: unknown limit {name!r}; known: {', '.join(known)}")
            try:
                changes[name] = None if text == "none" else float(text)
            except ValueError:
                raise LimitError(f"--tolerance {setting}: {text!r} is neither a number nor none") from None
        return replace(self, **changes)


TOLERANCES = {
    "fp32": Tolerance(embeddings=1e-5, hidden_states=1e-5, logits=1e-4, tokens=1.0),
    "bf16": Tolerance(vision_cosine=0.9999, baseline=1.15, logits_baseline=3.0),
    "int8": Tolerance(vision_cosine=0.9999, decoder_cosine=0.999),
    "fp8": Tolerance(vision_cosine=0.99, decoder_cosine=0.99, tokens=0.9),
    "nvfp4": Tolerance(vision_cosine=0.9999, decoder_cosine=0.95),
    "int4": Tolerance(vision_cosine=0.9999, decoder_cosine=0.95),
}


def model_order(name: str) -> tuple[int, int]:
    """Sorts outputs as the model computes them: a block's name ends in its number."""
    stages = (PIXELS, TOKENS, "visual.patch_embed", "visual.blocks.", IMAGE_EMBEDS, "model.layers.", HIDDEN_STATES)
    stage = next((rank for rank, start in enumerate(stages) if name.startswith(start)), len(stages))
    number = name.rpartition(".")[2]
    return stage, int(number) if number.isdecimal() else int(name == DECODE_LOGITS)


def tolerance_of(precision: str, reference: str = "fp32") -> Tolerance:
    """The limits of an engine against a reference, by their precisions.

    Those of the coarser of the two; a precision between FP32 and FP8 is held to BF16's. How far PyTorch's BF16 is from
    a reference that is itself rounded says nothing, so there the decoder is held to a cosine instead.
    """
    order = list(TOLERANCES)
    ranks = [order.index(name) if name in order else order.index("bf16") for name in (precision, reference)]
    limits = TOLERANCES[order[max(ranks)]]
    if ranks[1] == 0 or limits.baseline is None:
        return limits
    return replace(limits, baseline=None, logits_baseline=None, decoder_cosine=0.999)
