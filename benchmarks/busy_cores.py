r"""Decoding and encoding on a CPU beside busy processes, and under a quota of one core.

    python benchmarks/busy_cores.py --decoder smollm2-awq --encoder minilm-awq --json out.json

A worker holds both quantized models and runs on a signal: alone, beside one process that spins, and
beside two. A second worker lives in a control group of one CPU, where the groups can be written
(root, usually in a container of its own). Situations take turns, so that the machine's other work
meets all of them alike. A figure is the median over turns.

`share` is the part of the machine that the worker may claim: every process gets the same, and one
that spins takes one core at most. `of_share` is speed / (speed alone · share): 1 is proportional.
`same_bits` says whether tokens and embeddings were those of the first turn alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT, NEW, CONTEXT = 16, 32, 128
TEXT_TOKENS, ENCODE_SECONDS = 16, 1.0
QUOTA_PERIOD_US = 100_000


def worker(decoder: str, encoder: str) -> None:
    """Runs both models once for every line of its input, and answers with a line of JSON."""
    import torch

    from awq import AutoAWQForCausalLM, Encoder

    model = AutoAWQForCausalLM.from_quantized(
        decoder, fuse_layers=True, device="cpu", max_seq_len=CONTEXT
    )
    embed = Encoder.from_pretrained(encoder, device="cpu")
    text = " ".join(["river"] * (TEXT_TOKENS - 2))
    ids = torch.arange(5, 5 + PROMPT).view(1, -1)
    for _ in sys.stdin:
        print(json.dumps(_decode(model, ids) | _encode(embed, text)), flush=True)


def _decode(model: Any, ids: Any) -> dict[str, Any]:
    def generate(new: int) -> Any:
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    start = time.perf_counter()
    generate(1)
    middle = time.perf_counter()
    tokens = generate(1 + NEW)
    seconds = (time.perf_counter() - middle) - (middle - start)
    return {"decode_tok_s": NEW / seconds, "tokens": tokens.tolist()}


def _encode(embed: Any, text: str) -> dict[str, Any]:
    calls = 0
    start = time.perf_counter()
    while time.perf_counter() - start < ENCODE_SECONDS:
        vector = embed.encode(text)
        calls += 1
    seconds = time.perf_counter() - start
    bits = hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    return {"texts_s": calls / seconds, "embedding": bits}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that spin."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@contextlib.contextmanager
def one_core_group() -> Iterator[Path | None]:
    """A control group of one CPU; None where none can be made."""
    name = f"awq-busy-cores-{os.getpid()}"
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup") / (name if v2 else f"cpu/{name}")
    try:
        group.mkdir()
        if v2:
            (group / "cpu.max").write_text(f"{QUOTA_PERIOD_US} {QUOTA_PERIOD_US}")
        else:
            (group / "cpu.cfs_quota_us").write_text(str(QUOTA_PERIOD_US))
    except OSError as error:
        print(f"no control group of one CPU: {error}", file=sys.stderr)
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


class Worker:
    """A process that holds the models."""

    def __init__(self, arguments: argparse.Namespace, group: Path | None = None) -> None:
        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        command = [sys.executable, __file__, "--decoder", arguments.decoder]
        command += ["--encoder", arguments.encoder, "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=enter
        )
        self.run()  # compiles and fuses

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("go", file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def share_beside(count: int, cores: int) -> float:
    """Of the machine, for one process with work for all cores beside `count` that take one each."""
    even = cores / (count + 1)
    return (cores - count if even >= 1 else even) / cores


def summary(rows: list[dict[str, Any]], first: dict[str, Any], share: float) -> dict[str, Any]:
    bits = ("tokens", "embedding")
    return {
        "share": share,
        "same_bits": all(row[name] == first[name] for row in rows for name in bits),
        **{
            name: statistics.median(row[name] for row in rows)
            for name in ("decode_tok_s", "texts_s")
        },
        "decode_turns": [row["decode_tok_s"] for row in rows],
        "texts_turns": [row["texts_s"] for row in rows],
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    shares = {f"beside {n}": share_beside(n, cores) for n in arguments.busy}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in shares}
    with one_core_group() as group:
        free = Worker(arguments)
        bound = None if group is None else Worker(arguments, group)
        for _ in range(arguments.repeats):
            for count in arguments.busy:
                with busy(count):
                    rows[f"beside {count}"].append(free.run())
            if bound is not None:
                rows.setdefault("quota of one core", []).append(bound.run())
        free.close()
        if bound is not None:
            shares["quota of one core"] = 1 / cores
            bound.close()
            time.sleep(0.1)  # the group must be empty to be removed
    first = rows["beside 0"][0]
    found = {name: summary(values, first, shares[name]) for name, values in rows.items()}
    alone = found["beside 0"]
    for row in found.values():
        for name in ("decode_tok_s", "texts_s"):
            row[f"{name}_of_share"] = row[name] / (alone[name] * row["share"])
    return {"cores": cores, "situations": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", required=True, help="a quantized language model's directory")
    parser.add_argument("--encoder", required=True, help="a quantized encoder's directory")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.decoder, arguments.encoder)
        return
    import common

    result = measure(arguments)
    for name, row in result["situations"].items():
        print(
            f"{name:18s} share {row['share']:.2f}  decode {row['decode_tok_s']:6.1f} tok/s "
            f"({row['decode_tok_s_of_share']:.2f} of its share)  {row['texts_s']:6.0f} texts/s "
            f"({row['texts_s_of_share']:.2f})  same bits: {row['same_bits']}"
        )
    if arguments.json:
        common.write(arguments.json, "cpu", result)


if __name__ == "__main__":
    main()
