"""Our decoder against Transformers' ``generate``: 3B width, 4 layers, random weights; tokens a second by batch.

    python -m benchmarks.decoder [--work-dir DIR] [--repetitions 5] [--json FILE]

A figure is the time between tokens: an answer of 33 tokens less an answer of one, so prefill and start are not in it.
The floor is what reading every weight once a token would take, at the rate of the best of 25 matrix-vector products in
either form of the weight that torch offers here (plain, or packed by oneDNN), measured in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import truediv
from pathlib import Path

import torch

from accuracy.extra import allow_torchvision
from benchmarks.measure import Call, Contender, Result, compete, heading, machine, report, save
from benchmarks.random_model import CONFIG, prepare
from qwen2vl_trt.config import Qwen2VLConfig
from qwen2vl_trt.decoder import Decoder
from runtime import onednn
from runtime.detokenizer import AnswerStream
from runtime.request import Output
from runtime.runners import open_engines
from runtime.sampler import SamplingParams, SequenceSampling
from runtime.scheduler import RunningSequence, Scheduler

PROMPT, TOKENS = 64, 32
TEXT = Qwen2VLConfig.from_dict(CONFIG).text


def transformers_generate(checkpoint: Path, dtype: str, batch: int) -> Call:
    allow_torchvision()
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    del model.model.visual
    prompt = torch.randint(0, 150_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def answer(tokens: int) -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )

    return partial(between_tokens, answer)


def between_tokens(answer: Callable[[int], None]) -> float:
    """Seconds from a token to the next, prefill and start left out."""
    times = []
    for tokens in (1, TOKENS + 1):
        start = time.perf_counter()
        answer(tokens)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / TOKENS


class _Silent:
    """Stands where the tokenizer is: random weights have no words."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return ""


def our_scheduler(folder: Path, batch: int) -> Call:
    """The scheduler, the decoder engine and the sampler, as the pipeline uses them."""
    engines = open_engines(folder, "cpu")
    prompt = torch.randint(0, 150_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    positions = torch.arange(PROMPT).expand(3, -1)

    def answer(tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        scheduler = Scheduler(engines.decoder, PROMPT)
        for row in prompt:
            scheduler.add(
                RunningSequence(
                    output=Output(),
                    inputs_embeds=engines.decoder.embed(row),
                    position_ids=positions,
                    delta=0,
                    stream=AnswerStream(_Silent(), params, ()),
                    sampling=SequenceSampling(params, row, engines.checkpoint.config.text.vocab_size),
                )
            )
        while scheduler.busy:
            scheduler.step()

    return partial(between_tokens, answer)


def gemv_rate(dtype: torch.dtype) -> float:
    """Bytes a second of the best matrix-vector product, plain or packed, over a weight larger than any cache."""
    linear = torch.nn.Linear(TEXT.hidden_size, TEXT.vocab_size, bias=False, dtype=dtype)
    forms: list[Callable[[torch.Tensor], torch.Tensor]] = [linear]
    if onednn.available():
        forms.append(onednn.PackedLinear(linear))
    x = torch.randn(1, TEXT.hidden_size, dtype=dtype)
    rates = []
    with torch.no_grad():
        for form in forms:
            times = []
            for _ in range(25):
                start = time.perf_counter()
                form(x)
                times.append(time.perf_counter() - start)
            rates.append(linear.weight.numel() * dtype.itemsize / min(times))
    return max(rates)


def weight_count() -> int:
    """Weights read a token: all of the decoder's; the embedding is tied to the output and read as that."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(TEXT).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, help="keeps the random checkpoint; by default a temporary folder")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    facts = machine("transformers", "onnxruntime")
    heading(facts)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    rates = {name: gemv_rate(dtype) for name, dtype in dtypes.items()}
    print(" · ".join(f"best GEMV {name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items()))
    tables: dict[str, Sequence[Result]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        paths = prepare(options.work_dir or Path(temporary))
        for batch in (1, 8):
            contenders = [
                Contender(f"Transformers {name}", partial(transformers_generate, paths["checkpoint"], dtype, batch))
                for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
            ]
            contenders += [
                Contender(name, partial(our_scheduler, paths[name], batch))
                for name in ("torch bf16", "torch fp32", "onnxruntime fp32")
            ]
            title = f"decode, batch {batch}"
            tables[title] = compete(contenders, options.repetitions)
            report(title, tables[title], "tokens/s", partial(truediv, batch))
            for result in tables[title]:
                precision = "bf16" if "bf16" in result.name else "fp32"
                floor = weight_count() * dtypes[precision].itemsize / rates[precision]
                share = f"{floor / result.seconds:.2f} of the {precision} floor ({floor * 1e3:.1f} ms a token)"
                print(f"  {result.name:<42}{share}")
    save(options.json, facts, tables)


if __name__ == "__main__":
    main()
