"""What the scheduler itself costs: host time of a step over a decoder that answers at once, and counts.

Nothing here depends on a model or a GPU. Times are of this machine; counts are the same on every machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl_trt.config import TextConfig
from qwen2vl_trt.errors import BenchmarkError
from qwen2vl_trt.runtime.backends.common import KVCache
from qwen2vl_trt.runtime.backends.steps import Chunk, Step
from qwen2vl_trt.runtime.detokenizer import AnswerStream
from qwen2vl_trt.runtime.request import Output
from qwen2vl_trt.runtime.sampler import Sampler
from qwen2vl_trt.runtime.sampling_params import Sampling
from qwen2vl_trt.runtime.scheduling.kv_cache import SlotManager
from qwen2vl_trt.runtime.scheduling.scheduler import Scheduler
from qwen2vl_trt.runtime.scheduling.sequence import RunningSequence, token_keys

VOCABULARY = 151_936
"""Of the published 3B and larger."""

_TEXT = TextConfig(8, 1, 1, 1, 2, 8, VOCABULARY, False, 1e4, (1, 0, 0))
_ENDLESS = 1 << 30
_SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {},
    "a repetition penalty": {"repetition_penalty": 1.05},
    "temperature and top-k": {"temperature": 0.7, "top_k": 50},
}
_TOKENIZER = Tokenizer(models.BPE({chr(33 + token): token for token in range(90)}, []))
_TOKENIZER.decoder = decoders.ByteLevel()


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    name: str
    value: float
    unit: str


class InstantDecoder:
    """A :class:`~qwen2vl_trt.runtime.backends.runners.DecoderRunner` that computes nothing; its logits never change."""

    vocab_size, enqueues = VOCABULARY, True

    def __init__(self, slots: int, packed: bool = True) -> None:
        self.slots, self.packed, self.calls = slots, packed, 0
        self.cache = KVCache(_TEXT, slots, 8192, torch.float32, "cpu")
        logits, greedy = torch.zeros(slots, VOCABULARY), torch.full((slots,), 65)
        logits[:, 65] = 1
        self._steps = [Step(logits[:rows], None, greedy[:rows]) for rows in range(slots + 1)]

    def embed(self, token_ids: list[int] | Tensor) -> Tensor:
        return torch.zeros(len(token_ids), _TEXT.hidden_size)

    def step(
        self,
        chunks: Sequence[Chunk],
        inputs_embeds: Tensor,
        position_ids: Tensor,
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
    ) -> Step:
        self.calls += 1
        return self._steps[len(chunks) if wanted is None else len(wanted)]

    def reset(self) -> None:
        pass

    def warm_up(self, chunk: int, longest: int) -> None:
        pass


def measure(steps: int = 300) -> list[Figure]:
    """The table; ``steps`` of each time, whose median is taken."""
    figures = []
    for sequences in (1, 64):
        seconds = step_seconds(sequences, steps)
        figures.append(Figure(f"host time of a step, {sequences} greedy", seconds * 1e6, "us"))
        figures.append(Figure(f"the same, of a token, {sequences} greedy", seconds / sequences * 1e6, "us"))
    for name, settings in _SETTINGS.items():
        figures.append(Figure(f"operators of sampling 64 rows, {name}", sampling_operators(64, **settings), ""))
    for slots in (64, 256):
        seconds = prefix_seconds(slots, steps)
        figures.append(Figure(f"prefix search, {slots} slots behind 1,000 shared tokens", seconds * 1e6, "us"))
    for packed, kind in ((True, "packed"), (False, "padded")):
        figures.append(Figure(f"decoder calls for four short prompts, {kind}", prompt_calls(packed), ""))
    return figures


def step_seconds(sequences: int, steps: int) -> float:
    """Median seconds of a step in which so many greedy answers grow, text included."""
    decoder = InstantDecoder(sequences)
    scheduler = Scheduler(decoder, 512)
    for number in range(sequences):
        scheduler.add(_sequence(decoder, [1 + number % 64] * 8))
    return _median(scheduler.step, steps)


def sampling_operators(rows: int, **settings: Any) -> int:
    """Operators that PyTorch dispatches to sample so many rows, views of tensors left out."""
    sampler, logits = Sampler(rows, VOCABULARY), torch.zeros(rows, VOCABULARY)
    for slot in range(rows):
        sampler.start(slot, Sampling(_ENDLESS, seed=slot, **settings), [1, 2, 3])
    slots, greedy = list(range(rows)), logits.argmax(-1)
    sampler(logits, slots, greedy)  # what it allocates once
    with _Operators() as operators:
        sampler(logits, slots, greedy)
    return operators.count


def prefix_seconds(slots: int, times: int) -> float:
    """Median seconds to find what a prompt shares with others, all of which begin with the same 1,000 tokens."""
    decoder = InstantDecoder(slots)
    manager, shared = SlotManager(decoder.cache, slots), [1 + token % 64 for token in range(1000)]
    for number in range(slots - 1):
        one = _sequence(decoder, [*shared, number, number])
        manager.add(one)
        manager.allocate(one)
        one.cached = len(one.token_ids)
    late = _sequence(decoder, [*shared, slots, slots])
    manager.add(late)
    return _median(lambda: manager.wait(late), times)


def prompt_calls(packed: bool) -> int:
    """Calls of the decoder for four prompts of a few tokens that come together."""
    decoder = InstantDecoder(8, packed)
    scheduler = Scheduler(decoder, 512)
    for number in range(4):
        scheduler.add(_sequence(decoder, [number + 1] * (5 + number)))
    scheduler.step()
    return decoder.calls


def measure_beside(revision: str, steps: int, turns: int = 3) -> tuple[list[Figure], list[Figure]]:
    """The tables of this version and of another revision of this checkout, by its own ``bench scheduler``.

    They run turn about, each time in a process of its own; every figure is the median of the turns.

    Raises:
        BenchmarkError: this is no checkout, there is no such revision, or it does not have the command.
    """
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(root), "worktree"]
        made = subprocess.run([*git, "add", "--detach", folder, revision], capture_output=True, text=True)
        try:
            if made.returncode:
                raise BenchmarkError(f"--baseline {revision}: {made.stderr.strip().splitlines()[-1]}")
            command = [sys.executable, "run.py", "bench", "scheduler", "--json", "--steps", str(steps)]
            tables: dict[Path, list[list[Figure]]] = {root: [], Path(folder): []}
            for _ in range(turns):
                for checkout, found in tables.items():
                    ran = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
                    if ran.returncode:
                        name = revision if checkout != root else "this version"
                        raise BenchmarkError(f"--baseline {revision}: bench scheduler of {name} failed or is not there")
                    found.append([Figure(**figure) for figure in json.loads(ran.stdout)["figures"]])
            ours, theirs = (
                [replace(same[0], value=statistics.median(each.value for each in same)) for same in zip(*found)]
                for found in tables.values()
            )
            return ours, theirs
        finally:
            subprocess.run([*git, "remove", "--force", folder], capture_output=True)


class _Operators(TorchDispatchMode):
    """Counts operators that are not mere views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _sequence(decoder: InstantDecoder, prompt: list[int]) -> RunningSequence:
    positions = torch.arange(len(prompt)).expand(3, -1)
    output, params = Output(), Sampling(_ENDLESS)
    output.prompt_tokens = len(prompt)
    return RunningSequence(
        output=output,
        token_ids=prompt,
        text="",
        position_ids=positions,
        delta=0,
        media=[],
        places=np.empty(0, np.int64),
        keys=token_keys(prompt, positions.numpy()),
        stream=AnswerStream(_TOKENIZER, params, ()),
        params=params,
        inputs_embeds=decoder.embed(prompt),
    )


def _median(call: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times // 10 + times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[times // 10 :])
