"""Our decoder against Transformers' ``generate``: 3B width, 4 layers, random weights; tokens a second by batch.

    python -m qwen2vl_trt.benchmarks.decoder [--work-dir DIR] [--repetitions 5] [--json FILE]

A figure is the time between tokens: an answer of 33 tokens less an answer of one, so prefill and start are not in it.
The floor is what the weights and the cache of a step take to read, or its products to compute, at the best rates that
the same run measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path

import torch

from qwen2vl_trt.benchmarks.bench.run import load_graph
from qwen2vl_trt.benchmarks.floors.rates import Floor, measure_rates
from qwen2vl_trt.benchmarks.floors.work import count_work, decoder_call
from qwen2vl_trt.benchmarks.measure import Call, Contender, Sheet, option_parser, work_folder
from qwen2vl_trt.benchmarks.random_model import prepare
from qwen2vl_trt.benchmarks.subjects.transformers import load_model
from qwen2vl_trt.runtime.backends.runners import open_engines
from qwen2vl_trt.runtime.detokenizer import AnswerStream
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampler import Sampling, SequenceSampling
from qwen2vl_trt.runtime.scheduling.scheduler import RunningSequence, Scheduler

PROMPT, TOKENS = 64, 32
WORDS = range(1000, 150_000)
"""Token ids to draw prompts from: text, no special token."""


def random_prompts(batch: int) -> torch.Tensor:
    """The same for every contender: ``[batch, PROMPT]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(WORDS.start, WORDS.stop, (batch, PROMPT), generator=generator)


def transformers_generate(checkpoint: Path, dtype: torch.dtype, batch: int) -> Call:
    model = load_model(checkpoint, dtype, torch.device("cpu"))
    del model.model.visual
    prompt = random_prompts(batch)

    @torch.no_grad()
    def answer(tokens: int) -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            repetition_penalty=1.0,
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
    prompt = random_prompts(batch).tolist()
    positions = torch.arange(PROMPT).expand(3, -1)

    def answer(tokens: int) -> None:
        params = Sampling(max_tokens=tokens, ignore_eos=True)
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


def main() -> None:
    options = option_parser(__doc__, repetitions=5, work_dir=True).parse_args()
    sheet = Sheet(options, "transformers", "onnxruntime")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rates = {name: measure_rates(torch.device("cpu"), dtype) for name, dtype in dtypes.items()}
    print(" · ".join(f"{name} {rate.memory(max(rate.read)) / 1e9:.1f} GB/s" for name, rate in rates.items()))
    with work_folder(options) as folder:
        paths = prepare(folder)
        graphs = {name: load_graph(open_engines(paths[f"torch {name}"], "cpu"), "decoder") for name in dtypes}
        for batch in (1, 8):
            contenders = [
                Contender(f"Transformers {name}", partial(transformers_generate, paths["checkpoint"], dtype, batch))
                for name, dtype in dtypes.items()
            ]
            contenders += [
                Contender(name, partial(our_scheduler, paths[name], batch))
                for name in ("torch bf16", "torch fp32", "onnxruntime fp32")
            ]
            for result in sheet.compare(f"decode, batch {batch}", contenders, "tokens/s", partial(truediv, batch)):
                precision = "bf16" if "bf16" in result.name else "fp32"
                work = count_work(graphs[precision], decoder_call([PROMPT + TOKENS // 2] * batch, 1))
                floor = Floor.of(work, rates[precision]).seconds  # type: ignore[union-attr]  # no FP8, so never None
                share = f"{floor / result.seconds:.2f} of the {precision} floor ({floor * 1e3:.1f} ms a token)"
                print(f"  {result.name:<42}{share}")
    sheet.save()


if __name__ == "__main__":
    main()
