"""Measure which kernel configurations are fastest on this GPU for a model's linears, and keep them
as a table for later runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="quantized directory or hub id whose linears to tune for"
    )
    parser.add_argument(
        "--shapes",
        nargs="*",
        default=[],
        metavar="NxK",
        help="more linears, outputs x inputs, e.g. 4096x14336",
    )
    parser.add_argument(
        "--group-size", type=int, default=128, help="of --shapes; -1: the whole row"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="*", help="numbers of tokens; default: those that tables hold"
    )
    parser.add_argument(
        "--dtypes", nargs="*", default=["float16", "bfloat16"], choices=["float16", "bfloat16"]
    )
    parser.add_argument("--seconds", type=float, default=300, help="at most so long for the timing")
    parser.add_argument(
        "--workers", type=int, help="processes that compile; default: one per CPU core"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="table to write or add to; default: the user's, which later runs read",
    )


def run(arguments: argparse.Namespace) -> None:
    import os

    import torch

    from awq.cli.output import show
    from awq.errors import ConfigError
    from awq.kernels.triton import why_not

    given = _given(arguments)
    if not given and not arguments.model:
        raise ConfigError("name a quantized model, or linears as --shapes NxK.")
    if not torch.cuda.is_available():  # before a model is loaded for it
        raise ConfigError("kernels are tuned on the GPU that is to run them, and there is none.")

    device = torch.device("cuda", 0)
    shapes = sorted({*given, *(_of_model(arguments.model) if arguments.model else ())})
    for shape in shapes:
        reason = why_not(device, torch.float16, shape)
        if reason is not None:
            raise ConfigError(f"a linear of {shape} does not run on Triton's kernels: {reason}.")

    from awq.kernels.triton import configs, launcher, tuning

    gpu = torch.cuda.get_device_name(0)
    architecture, processors = launcher.architecture(0)
    path = arguments.output or configs.user_tables() / f"{architecture}.json"
    tokens = arguments.tokens or configs.BUCKETS
    found = tuning.tune(
        shapes,
        {getattr(torch, name): tokens for name in arguments.dtypes},
        arguments.seconds,
        arguments.workers or os.cpu_count() or 1,
        (lambda line: None) if arguments.json else print,
    )

    rows: list[dict[str, Any]] = []
    for (shape, dtype, m), times in found.items():
        present = configs.config_for(architecture, processors, shape, m, dtype)
        gain = tuning.gain(times, present)
        rows.append(
            {
                "shape": configs.size_of(shape),
                "dtype": str(dtype)[6:],
                "tokens": m,
                "us": round(times[0].microseconds, 2),
                "config": times[0].config,
                "times_as_fast": None if gain is None else round(gain, 3),
            }
        )

    tuning.write_table(path, gpu, found)
    result = {"gpu": gpu, "table": str(path), "best": rows}
    text = f"{len(rows)} entries written to {path}{_faster(rows)}"
    show(result, arguments.json, text)


def _faster(rows: list[dict[str, Any]]) -> str:
    """What the table gains over the configurations that served before."""
    from statistics import median

    gains = [row["times_as_fast"] for row in rows if row["times_as_fast"] is not None]
    if not gains:
        return ""
    return f": {median(gains):.2f} times as fast as before (median; best {max(gains):.2f})"


def _given(arguments: argparse.Namespace) -> list[Any]:
    from awq.errors import ConfigError
    from awq.kernels import Shape

    found = []
    for text in arguments.shapes:
        sizes = text.lower().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise ConfigError(f"--shapes takes outputs x inputs, e.g. 4096x14336, not {text!r}.")
        n, k = map(int, sizes)
        found.append(Shape(k, n, k if arguments.group_size == -1 else arguments.group_size))

    return found


def _of_model(path: str) -> set[Any]:
    """Shapes of a quantized model's linears, alone and, where generation joins siblings to one
    product, together."""
    from awq import AutoAWQForCausalLM, AutoAWQForEmbedding
    from awq.embed.directory import is_sentence_model
    from awq.kernels import Shape
    from awq.nn.linear import WQLinear

    door = AutoAWQForEmbedding if is_sentence_model(path) else AutoAWQForCausalLM
    loaded = door.from_quantized(path)

    def shapes(modules: Any) -> set[Any]:
        return {
            Shape(m.in_features, m.out_features, m.group_size)
            for m in modules
            if isinstance(m, WQLinear)
        }

    found = shapes(loaded.model.modules())
    decoder = loaded.fuse() if hasattr(loaded, "fuse") else None
    blocks = () if decoder is None else decoder.body.blocks
    joined = (module for block in blocks for module in block.modules())

    return found | shapes(joined)
