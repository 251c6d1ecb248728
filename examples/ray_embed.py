"""Embeds a file of texts on several processes with Ray; `pip install "ray[data]"` first.

    python examples/ray_embed.py DIRECTORY texts.jsonl vectors --column text --workers 2

Each worker loads the model once and embeds batch after batch into a folder of Parquet files.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray


class Embedder:
    """A worker: the model lives in its process as long as Ray keeps it."""

    def __init__(self, directory: str, column: str) -> None:
        from awq import Encoder

        self.column = column
        self.encoder = Encoder.from_pretrained(directory)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = list(batch[self.column])
        batch["embedding"] = self.encoder.encode(texts, normalize=True).numpy()
        return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("texts", help="a .jsonl file")
    parser.add_argument("output", help="a folder for Parquet files")
    parser.add_argument("--column", default="text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="of one worker")
    arguments = parser.parse_args()

    rows = ray.data.read_json(arguments.texts)
    embedded = rows.map_batches(
        Embedder,
        fn_constructor_args=(arguments.directory, arguments.column),
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_gpus=arguments.gpus,
    )
    embedded.write_parquet(arguments.output)
    print(f"{rows.count()} texts embedded to {arguments.output}")


if __name__ == "__main__":
    main()
