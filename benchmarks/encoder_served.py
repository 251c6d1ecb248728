r"""Embeddings over HTTP: this package's encoders behind FastAPI, beside onnxruntime's int8.

    python benchmarks/encoder_served.py --model all-MiniLM-L6-v2 --quantized minilm-awq \
        --json out.json

Every server is a process of its own with one route: `POST /embed` takes texts and answers with
numbers. `loader` runs the model that `AutoAWQLoader` gives, mean-pooled by the host's own code;
`encoder` and `native` call this package's `Encoder` and `NativeEncoder`; `onnx-int8` is that of
`encoder_peers.py`. FastAPI calls all of them from its threads. One process with `--clients` threads
asks over loopback, one text of 16 tokens at a time, each thread as soon as its answer is there.
Servers take turns; figures are medians over turns. Client and server share the cores, as the
client of every server does.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import encoder_peers as peers

SERVERS = ("loader", "encoder", "native", "onnx-int8")
WAIT_S = 120  # for a server to come up
TOKENS = 16


# A server's process


def loaded(name: str, arguments: argparse.Namespace) -> peers.Encode:
    if name == "loader":
        return by_loader(arguments.quantized)
    if name == "onnx-int8":
        return peers.onnx(arguments.model, arguments.work)
    if name == "native":
        return peers.awq_native(arguments.quantized, "exact")
    return peers.awq(arguments.quantized, "exact")


def by_loader(quantized: str) -> peers.Encode:
    """What a host does with the model and tokenizer that `AutoAWQLoader` gives."""
    sys.path.insert(0, str(peers.ROOT))
    import torch

    from awq.integrations.emb_model_provider import AutoAWQLoader

    model, tokenizer = AutoAWQLoader("model", model_path=quantized, device="cpu").load_model()

    @torch.no_grad()
    def encode(texts: list[str]) -> Any:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()

    return encode


def serve(name: str, arguments: argparse.Namespace) -> None:
    import uvicorn
    from fastapi import FastAPI

    encode = loaded(name, arguments)
    encode(["The river is cold."])
    app = FastAPI()

    @app.post("/embed")
    def embed(body: dict) -> dict:
        return {"embeddings": encode(body["texts"]).tolist()}

    @app.get("/memory")
    def memory() -> dict:
        return peers.memory_mb()

    uvicorn.run(app, port=arguments.port, log_level="error")


# The client


class Server:
    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, __file__, "--serve", name, "--port", str(self.port)]
        command += ["--model", arguments.model, "--quantized", arguments.quantized]
        command += ["--work", str(arguments.work)]
        self.name = name
        self.log = arguments.work / f"{name}.log"
        self.process = subprocess.Popen(command, stderr=self.log.open("w"))
        self.is_ready = self._wait()

    def _wait(self) -> bool:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.memory()
                return True
            except OSError:
                time.sleep(0.1)
        return False

    def memory(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/memory")
        return json.loads(connection.getresponse().read())


def ask(port: int, texts: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, and milliseconds of one."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def client(i: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        own = []
        while time.perf_counter() < end:
            body = json.dumps({"texts": [texts[(i + len(own)) % len(texts)]]})
            began = time.perf_counter()
            connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise SystemExit(f"the server answers {answer.status}")
            own.append(time.perf_counter() - began)
        times.extend(own)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    p50, p95 = (1e3 * times[int(len(times) * share)] for share in (0.5, 0.95))
    return {"requests_s": len(times) / seconds, "p50_ms": p50, "p95_ms": p95}


def measure(arguments: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    servers = [Server(name, arguments) for name in arguments.servers]
    left_out = {server.name: server.log.read_text()[-300:] for server in servers}
    servers = [server for server in servers if server.is_ready]
    turns: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for _ in range(arguments.repeats):
        for server in servers:
            ask(server.port, texts, arguments.clients, 1)
            turns[server.name].append(ask(server.port, texts, arguments.clients, arguments.seconds))
    rows = {}
    for server in servers:
        own = turns[server.name]
        medians = {name: statistics.median(turn[name] for turn in own) for name in own[0]}
        rows[server.name] = medians | server.memory() | {"turns": own}
        del left_out[server.name]
        server.process.terminate()
        server.process.wait()
    return {"left_out": left_out, "clients": arguments.clients, "servers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a sentence-transformers directory")
    parser.add_argument("--quantized", required=True, help="its 4-bit directory")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = Path(folder)
        if "onnx-int8" in arguments.servers:
            peers.write_onnx(arguments.model, arguments.work)
        tokenizer = peers._tokenizer(arguments.model)
        tokenizer.no_padding()
        result = measure(arguments, peers.texts_of(tokenizer, TOKENS, 64))
    for name, row in result["servers"].items():
        rate, p50, p95 = (row[key] for key in ("requests_s", "p50_ms", "p95_ms"))
        print(
            f"{name:10s} {rate:6.0f}/s  p50 {p50:.1f} ms  p95 {p95:.1f} ms  {row['now_mb']:.0f} MB"
        )
    if arguments.json:
        import common

        common.write(arguments.json, "cpu", result)


if __name__ == "__main__":
    main()
