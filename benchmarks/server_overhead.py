"""What HTTP costs: the same requests to a Service and to a server over it, in one process.

Each request has the same picture; answers are half as long as --output-tokens to one and a half times, or requests that
come at one time would end at one time too, in batches that no server sees. The server's client is a process of its own
that only writes and reads sockets. Prints requests/s, CPU time of a request (of this process, all threads), and what
the server costs of each over the Service: medians of rounds in turn.

    benchmarks/server_overhead.py --engine-dir DIR --clients 1 4 16
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import uvicorn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from qwen2vl_trt import Pipeline, Request, SamplingParams, Service  # noqa: E402
from qwen2vl_trt.serving.app import App, ServerSettings  # noqa: E402
from qwen2vl_trt.serving.server import TimedProtocol  # noqa: E402

PROMPT = "What digits are in the image?"


def main() -> None:
    """Measure in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16")
    parser.add_argument("--requests", type=int, default=96, help="at each number of clients; default %(default)s")
    parser.add_argument("--output-tokens", type=int, default=32, help="of an answer, mean; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "digits.png", help="default %(default)s")
    arguments = parser.parse_args()

    image, count = arguments.image.read_bytes(), arguments.requests
    pipeline = Pipeline.from_engine_dir(arguments.engine_dir, "cpu")
    asked, mean = Request(PROMPT, [image]), arguments.output_tokens
    lengths = [mean // 2 + 7919 * number % (mean + 1) for number in range(count)]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    body = {"messages": [{"role": "user", "content": content}], "ignore_eos": True}
    bodies = [body | {"max_tokens": length} for length in lengths]
    pipeline.generate([asked] * 2, params[:2])
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    print("| clients | | requests/s | CPU ms a request |\n| --- | --- | --- | --- |")
    with Service(pipeline) as service:
        app = App(ServerSettings("model"))
        app.open(service, pipeline)
        config = uvicorn.Config(
            app, port=0, log_level="error", lifespan="off", ws="none", http=partial(TimedProtocol, seconds=30)
        )
        server = uvicorn.Server(config)
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        for clients in arguments.clients:
            systems: dict[str, Callable[[], None]] = {
                "Service": lambda clients=clients: asyncio.run(_submit(service, asked, params, clients)),
                "server": lambda clients=clients: _post(port, bodies, clients),
            }
            for _ in range(arguments.rounds):
                for name, run in systems.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    run()
                    used = time.perf_counter() - wall, time.process_time() - cpu
                    found.setdefault((clients, name), []).append((count / used[0], 1000 * used[1] / count))
            rates, cpus = ({name: median(each[n] for each in found[clients, name]) for name in systems} for n in (0, 1))
            for name in systems:
                print(f"| {clients} | {name} | {rates[name]:.2f} | {cpus[name]:.2f} |")
            less, more = 1 - rates["server"] / rates["Service"], cpus["server"] / cpus["Service"] - 1
            print(f"| | the server's cost | {less:.1%} | {more:.1%} |", flush=True)
        server.should_exit = True


async def _submit(service: Service, request: Request, params: list[SamplingParams], clients: int) -> None:
    left = iter(params)

    async def client() -> None:
        for each in left:
            (await service.submit(request, each)).text  # noqa: B018 - raises what went wrong

    await asyncio.gather(*(client() for _ in range(clients)))


def _post(port: int, bodies: list[dict[str, object]], clients: int) -> None:
    given = [sys.executable, "-c", _CLIENT, str(port), str(clients)]
    subprocess.run(given, input=json.dumps(list(map(json.dumps, bodies))), text=True, check=True)


_CLIENT = """
import json, os, socket, sys, threading
port, clients = map(int, sys.argv[1:])
head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
left = iter([f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode() for body in json.load(sys.stdin)])
def client():
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as answer:
        for message in left:
            connection.sendall(message)
            head = [answer.readline()]
            while head[-1] != b"\\r\\n":
                head.append(answer.readline())
            length = next(int(line[15:]) for line in head if line.lower().startswith(b"content-length:"))
            found = answer.read(length)
            if b" 200 " not in head[0]:
                os.write(2, found)
                os._exit(1)
threads = [threading.Thread(target=client) for _ in range(clients)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

if __name__ == "__main__":
    main()
