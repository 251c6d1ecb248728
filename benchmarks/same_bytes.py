"""Hashes of quantized weights, to show that a change of the code leaves every saved byte as it was.

Quantizes 15 tiny random models of the test zoo with each preset, and MiniLM with --minilm, and
prints a JSON object {"family preset": sha256 of the names, dtypes, shapes and bytes of all saved
tensors}. The models and inputs come from this checkout; the quantizer is whichever `awq` Python
finds, so another checkout is measured by its path:

    python benchmarks/same_bytes.py --write before.json                        # this checkout
    PYTHONPATH=/other/checkout python benchmarks/same_bytes.py --against before.json

`--against` ends with status 1 and names every model whose bytes differ. One thread, because sums of
floats depend on how they are split among threads. Hashes of different machines or torch versions
are not comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
# before benchmarks/zoo.py, which is another one
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import zoo  # noqa: E402

import awq  # noqa: E402
from awq.calibration import CalibrationBatch  # noqa: E402

FAMILIES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "falcon",
    "gpt_neox",
    "opt",
    "bloom",
    "cohere",
    "gpt2",
    "bert",
    "mpnet",
    "distilbert",
    "modernbert",
]
PRESETS = ["fast", "balanced", "best"]


def batches(
    count: int = 10, rows: int = 4, length: int = 16, first_id: int = 3, vocabulary: int = 63
) -> list[CalibrationBatch]:
    """Batches of random ids, some padded: ten are enough for one of eight to be held out when
    scales are tuned."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        ids = torch.randint(first_id, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if index % 3 == 0:
            mask[0, length * 2 // 3 :] = 0
        found.append(CalibrationBatch(ids, mask))
    return found


def digest(model: nn.Module) -> str:
    """sha256 over all tensors of the state dict, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tiny_models(families: list[str], presets: list[str]) -> Iterator[tuple[str, str]]:
    """(family and preset, digest) for every pair."""
    for family in families:
        for preset in presets:
            model = zoo.tiny_model(family)
            options = awq.QuantizeOptions(preset=preset, progress=False)
            awq.quantize_model(model, batches(), awq.AwqConfig(group_size=16), options)
            yield f"{family} {preset}", digest(model)


def minilm(presets: list[str]) -> Iterator[tuple[str, str]]:
    """all-MiniLM-L6-v2 on random ids: no text, so that the bundled one may change without changing
    these hashes."""
    from real_models import minilm_dir

    for preset in presets:
        model = awq.AutoAWQForEmbedding.from_pretrained(str(minilm_dir())).model
        options = awq.QuantizeOptions(preset=preset, progress=False)
        rows = batches(rows=16, length=32, first_id=1000, vocabulary=30000)
        awq.quantize_model(model, rows, awq.AwqConfig(group_size=32), options)
        yield f"minilm {preset}", digest(model)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", help="only these families (repeatable)")
    parser.add_argument(
        "--preset", action="append", choices=PRESETS, help="only these presets (repeatable)"
    )
    parser.add_argument("--minilm", action="store_true", help="MiniLM, too")
    parser.add_argument("--write", type=Path, help="write the hashes into a file")
    parser.add_argument("--against", type=Path, help="compare with a file written before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    presets = arguments.preset or PRESETS
    hashes = dict(tiny_models(arguments.family or FAMILIES, presets))
    if arguments.minilm:
        hashes |= dict(minilm(presets))
    text = json.dumps({"torch": torch.__version__, "hashes": hashes}, indent=1)
    if arguments.write:
        arguments.write.write_text(text + "\n", encoding="utf-8")
    if not arguments.against:
        print(text)
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))["hashes"]
    different = [name for name, value in hashes.items() if before.get(name) != value]
    print(f"{len(hashes) - len(different)} of {len(hashes)} equal", *different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
