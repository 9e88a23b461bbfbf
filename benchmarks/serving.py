"""`run.py serve` beside `transformers serve` and vLLM, on the same weights and under the same client, evalscope.

The peers and evalscope lie in virtual environments of their own (docs/guide/serve.md, Measured). Weights are random, of
the published shape of a model with a few layers; every request has a picture of its own. A server is started, measured
and ended before the next one starts, and figures are printed as Markdown.

    benchmarks/serving.py --evalscope E/bin/evalscope --peer transformers=T/bin/transformers --peer vllm=V/bin/vllm
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from qwen2vl_trt.benchmarks.random_model import random_checkpoint  # noqa: E402
from qwen2vl_trt.checkpoint import SINGLE_FILE  # noqa: E402
from qwen2vl_trt.published import SHAPES  # noqa: E402

START_SECONDS = 900


def main() -> None:
    """Measure each server, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evalscope", type=Path, required=True, help="the program")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="KIND=PROGRAM", help="transformers=... or vllm=...; repeat"
    )
    parser.add_argument("--shape", choices=SHAPES, default="Qwen2.5-VL-3B", help="default %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder; default %(default)s")
    parser.add_argument("--blocks", type=int, default=4, help="of the vision tower; default %(default)s")
    parser.add_argument("--backend", default="onnxruntime", help="of ours; default %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16")
    parser.add_argument("--requests", type=int, default=16, help="at each number of clients; default %(default)s")
    parser.add_argument("--size", type=int, default=224, help="width and height of a picture; default %(default)s")
    parser.add_argument("--output-tokens", type=int, default=16, help="of an answer; default %(default)s")
    parser.add_argument("--dtype", default="float32", help="of the peers; default %(default)s")
    parser.add_argument("--work", type=Path, default=Path("artifacts/serving"), help="default %(default)s")
    arguments = parser.parse_args()
    model = random_checkpoint(arguments.shape, arguments.layers, arguments.blocks, arguments.work).resolve()
    answer_with_known_tokens(model)
    rows = []
    for name, command in _servers(arguments, model).items():
        with _serving(command, arguments.work / f"{name}.log") as address:
            for clients in arguments.clients:
                rows.append((name, clients, _measured(arguments, model, address, clients)))
                print(name, clients, rows[-1][2], file=sys.stderr)
    print("| server | clients | requests/s | first token, s | between tokens, ms | tokens of an answer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, clients, found in sorted(rows, key=lambda row: row[1]):
        first, between = found["Avg TTFT (ms)"] / 1000, found["Avg TPOT (ms)"]
        rate, tokens = found["Req Throughput (req/s)"], found["Avg Output Tokens"]
        print(f"| {name} | {clients} | {rate:.2f} | {first:.2f} | {between:.0f} | {tokens:.1f} |")


def _servers(arguments: argparse.Namespace, model: Path) -> dict[str, list[str]]:
    """The command of each server, without its port."""
    peers = {
        "transformers": ["serve", model, "--dtype", arguments.dtype, "--device", "cpu"],
        "vllm": [
            *("serve", model, "--dtype", arguments.dtype, "--max-model-len", 1024, "--gpu-memory-utilization", 0.4),
            *("--limit-mm-per-prompt", '{"image": 1, "video": 0}', "--mm-processor-kwargs", '{"max_pixels": 802816}'),
        ],
    }
    most = max(arguments.clients)
    limits = ["--max-num-seqs", most, "--max-input-len", 768, "--max-seq-len", 1024, "--max-hw-dims", 1024]
    ours = ["serve", "--model", model, "--served-model-name", model, "--backend", arguments.backend, *limits]
    ours += ["--engine-dir", f"{model}-{arguments.backend}"]
    commands: dict[str, list[Any]] = {"qwen2vl-trt": [sys.executable, ROOT / "run.py", *ours]}
    for peer in arguments.peer:
        kind, _, program = peer.partition("=")
        commands[kind] = [program, *peers[kind]]
    return {name: [*map(str, command)] for name, command in commands.items()}


def answer_with_known_tokens(model: Path) -> None:
    """Zero the rows of the vocabulary that the tokenizer does not have, so that every answer has text."""
    known = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()
    file = model / SINGLE_FILE
    with safe_open(file, "np") as weights:
        names = [name for name in weights.keys() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]  # noqa: SIM118
    with file.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
        header = json.loads(start.read(size))
    for name in names:
        rows, width = header[name]["shape"]
        begin = 8 + size + header[name]["data_offsets"][0]
        table = np.memmap(file, np.int16, "r+", begin, (rows, width))
        table[known:] = 0
        table.flush()


@contextmanager
def _serving(command: list[str], log: Path) -> Iterator[str]:
    """Start a server; gives its address once it answers, and ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        output.write(shlex.join([*command, "--port", str(port)]) + "\n")
        output.flush()
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=output,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    ready = "/ready" if command[0] == sys.executable else "/v1/models"
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"error: the server did not start; see {log}")
            with suppress(OSError), urllib.request.urlopen(f"{address}{ready}", timeout=5) as response:
                if ready == "/ready" or json.load(response)["data"]:
                    break
            time.sleep(1)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _measured(arguments: argparse.Namespace, model: Path, address: str, clients: int) -> dict[str, float]:
    """What evalscope finds; a request that fails ends the program."""
    with tempfile.TemporaryDirectory() as folder:
        number = max(arguments.requests, clients)
        command = [
            *(arguments.evalscope, "perf", "--api", "openai", "--url", f"{address}/v1/chat/completions"),
            *("--model", model, "--tokenizer-path", model, "--stream", "--seed", 1, "--no-test-connection"),
            *("--dataset", "random_vl", "--image-width", arguments.size, "--image-height", arguments.size),
            *("--min-prompt-length", 8, "--max-prompt-length", 9, "--max-tokens", arguments.output_tokens),
            *("--warmup-num", clients, "--number", number, "--parallel", clients),
            *("--outputs-dir", folder, "--no-timestamp"),
        ]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
        reports = [*Path(folder).glob("**/benchmark_summary.json")]
        if done.returncode or len(reports) != 1:
            raise SystemExit(f"error: evalscope failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(reports[0].read_text())
    if found["Failed Requests"] or found["Total Requests"] < number:
        raise SystemExit(f"error: requests failed: {found}")
    return found


if __name__ == "__main__":
    main()
