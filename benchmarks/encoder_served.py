r"""Embeddings over HTTP: this package's encoders behind FastAPI, beside onnxruntime's int8.

    python benchmarks/encoder_served.py --model all-MiniLM-L6-v2 --quantized minilm-awq \
        --json out.json

Every server is a process of its own with one route: `POST /embed` takes texts and answers with
numbers. `loader` runs the model that `AutoAWQLoader` gives, mean-pooled by the host's own code;
`encoder` and `native` call this package's `Encoder` and `NativeEncoder`; `onnx-int8` is that of
`encoder_peers.py`. FastAPI calls all of them from its threads. `example` is
`examples/embedding_server.py`, asked through OpenAI's interface. One process with as many threads
as `--clients` says asks over loopback, one text of 16 tokens at a time, each thread as soon as its
answer is there. Servers take turns; figures are medians over turns. Client and server share the
cores, as the client of every server does. `now_mb` and `peak_mb` are resident memory of the
server's process after the last turn.
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

SERVERS = ("loader", "encoder", "native", "native-int8", "example", "onnx-int8")
WAIT_S = 120  # for a server to come up
TOKENS = 16


# A server's process


def loaded(name: str, arguments: argparse.Namespace) -> peers.Encode:
    if name == "loader":
        return by_loader(arguments.quantized)
    if name == "onnx-int8":
        return peers.onnx(arguments.model, arguments.work)
    if name.startswith("native"):
        return peers.awq_native(arguments.quantized, "int8" if "int8" in name else "exact")
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

    app = FastAPI() if name != "example" else example(arguments.quantized)
    if name != "example":
        encode = loaded(name, arguments)
        encode(["The river is cold."])

        @app.post("/embed")
        def embed(body: dict) -> dict:
            return {"embeddings": encode(body["texts"]).tolist()}

    @app.get("/memory")
    def memory() -> dict:
        return peers.memory_mb()

    uvicorn.run(app, port=arguments.port, log_level="error")


def example(quantized: str) -> Any:
    """The application of `examples/embedding_server.py`."""
    sys.path[:0] = [str(peers.ROOT), str(peers.ROOT / "examples")]
    os.environ["MODEL"] = quantized
    import embedding_server

    return embedding_server.app


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
        openai = name == "example"
        self.path, self.field = ("/v1/embeddings", "input") if openai else ("/embed", "texts")
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


def ask(server: Server, texts: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, and milliseconds of one."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def client(i: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        own = []
        while time.perf_counter() < end:
            body = json.dumps({server.field: [texts[(i + len(own)) % len(texts)]]})
            began = time.perf_counter()
            connection.request("POST", server.path, body, {"Content-Type": "application/json"})
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
    turns: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for clients in arguments.clients:
            for server in servers:
                ask(server, texts, clients, arguments.seconds / 4)
                turn = ask(server, texts, clients, arguments.seconds)
                turns.setdefault((server.name, clients), []).append(turn)
    rows: dict[str, Any] = {}
    for server in servers:
        rows[server.name] = server.memory()
        for clients in arguments.clients:
            own = turns[server.name, clients]
            medians = {name: statistics.median(turn[name] for turn in own) for name in own[0]}
            rows[server.name][f"{clients} clients"] = medians | {"turns": own}
        del left_out[server.name]
        server.process.terminate()
        server.process.wait()
    return {"left_out": left_out, "servers": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a sentence-transformers directory")
    parser.add_argument("--quantized", required=True, help="its 4-bit directory")
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="a folder that keeps onnxruntime's model")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.work.mkdir(exist_ok=True)
        kept = (arguments.work / peers.ONNX_INT8).exists()
        if "onnx-int8" in arguments.servers and not kept:
            peers.write_onnx(arguments.model, arguments.work)
        tokenizer = peers._tokenizer(arguments.model)
        tokenizer.no_padding()
        result = measure(arguments, peers.texts_of(tokenizer, TOKENS, 64))
    for name, row in result["servers"].items():
        rates = "  ".join(
            f"{clients}: {turn['requests_s']:.0f}/s p50 {turn['p50_ms']:.1f} p95 "
            f"{turn['p95_ms']:.1f} ms"
            for clients in arguments.clients
            for turn in (row[f"{clients} clients"],)
        )
        print(f"{name:12s} {row['now_mb']:4.0f} MB  {rates}")
    if arguments.json:
        import common

        common.write(arguments.json, "cpu", result)


if __name__ == "__main__":
    main()
