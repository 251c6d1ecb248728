"""Mutants of checkpoints, through every door of the package: each is refused by an error of its own, or gives right values.

A mutant is one change by a seeded generator: a tensor dropped, renamed, cast, cut or spoiled; a key of a JSON file given an
odd value; bytes flipped or a file cut. Faults are: an exception that is not the package's, numbers that are not finite, and
(for changes of tensors that leave their values alone) outputs that differ, since something was made up then.

`python tests/fuzz.py --mutants 20000 --seed 0` prints every fault with the seed that repeats it: `--seed N --mutants 1`.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from awq import AutoAWQForCausalLM, Encoder
from awq.checkpoint import convert_checkpoint
from awq.checkpoint.source import Source
from awq.errors import AwqError

SAME = 1e-2  # relative error: casting a norm to 16 bits changes that much, a made-up tensor far more
IDS = torch.arange(4, 16).view(2, 6)
TEXTS = ["the cat", "a dog sleeps under the old tree"]
ODD = [None, True, -1, 0, 1, 3, 2.5, "x", "", [], {}, [1], {"a": 1}, float("nan"), 10**9, "../x", "\x00", "\u202e"]
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
JSON_FILES = ["config.json", "generation_config.json", "modules.json", "config_sentence_transformers.json",
              "sentence_bert_config.json", "1_Pooling/config.json"]  # fmt: skip


def tensor_mutant(folder: Path, chance: random.Random) -> str:
    """A tensor is missing, has another name or dtype, is cut, or holds NaN."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    kind = chance.choice(["drop", "rename", "cast", "cut", "spoil", "add", "swap"])
    tensor = tensors.pop(name)
    if kind == "rename":
        place = chance.randrange(len(name))
        tensors[name[:place] + chance.choice("abxyz.019_") + name[place + 1 :]] = tensor
    elif kind == "cast":
        tensors[name] = tensor.to(chance.choice(DTYPES))
    elif kind == "cut":
        tensors[name] = tensor[: max(1, len(tensor) // 2)].clone()
    elif kind == "spoil":
        spoiled = tensor.clone()
        if spoiled.is_floating_point():
            spoiled.view(-1)[chance.randrange(spoiled.numel())] = chance.choice([float("nan"), float("inf")])
        tensors[name] = spoiled
    elif kind == "add":
        tensors |= {name: tensor, f"{name}_more": torch.ones(2)}
    elif kind == "swap":
        other = chance.choice(sorted(tensors))
        if tensors[other].shape != tensor.shape or tensors[other].dtype != tensor.dtype:
            tensors[name], tensors[other] = tensors[other], tensor
        else:
            tensors[name] = tensor
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"})
    return f"{kind} {name}"


def json_mutant(folder: Path, chance: random.Random) -> str:
    """A key of a settings file has an odd value, or is missing."""
    path = folder / chance.choice([name for name in JSON_FILES if (folder / name).exists()])
    content = json.loads(path.read_text())
    places = list(_places(content))
    if not places:
        return "nothing"
    parent, key = chance.choice(places)
    value = chance.choice([*ODD, "drop"])
    if value == "drop":
        del parent[key]
    else:
        parent[key] = value
    path.write_text(json.dumps(content))
    return f"{path.name} {key} = {value!r}"


def _places(content):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def bytes_mutant(folder: Path, chance: random.Random) -> str:
    """Bytes of a file are flipped, or its end is missing."""
    names = [name for name in ["model.safetensors", *JSON_FILES, "tokenizer.json"] if (folder / name).exists()]
    path = folder / chance.choice(names)
    data = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]
        what = "cut"
    else:
        place = chance.randrange(min(len(data), 4000))
        data[place] ^= 1 << chance.randrange(8)
        what = f"flip at {place}"
    path.write_bytes(data)
    return f"{path.name} {what}"


MUTANTS = {"tensor": tensor_mutant, "json": json_mutant, "bytes": bytes_mutant}


def language_model(folder: Path) -> torch.Tensor:
    return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False)(IDS).logits


def encoder(folder: Path) -> torch.Tensor:
    return Encoder.from_pretrained(folder, device="cpu").encode(TEXTS)


def converted(folder: Path) -> None:
    convert_checkpoint(folder, folder.parent / "converted", "gemv")
    shutil.rmtree(folder.parent / "converted")


def looked_at(folder: Path) -> None:
    source = Source.open(folder)
    source.settings.to_dict()
    len(source.packed)


def outcome(door, folder: Path, expected: torch.Tensor | None, kind: str) -> str:
    """ "refused", "right", "as told" or the fault, beginning with "FAULT"."""
    try:
        with torch.no_grad():
            value = door(folder)
    except AwqError:
        return "refused"
    except Exception as error:
        return f"FAULT foreign {type(error).__name__}: {str(error)[:160]!r}"
    if expected is None or value is None:
        return "right"
    if not torch.isfinite(value).all():
        return "FAULT not finite"
    if value.shape == expected.shape and (value - expected).norm() <= SAME * expected.norm():
        return "right"
    return "FAULT made up" if kind == "tensor" else "as told"


def run(originals: dict, seeds: range, seconds: float | None = None) -> tuple[collections.Counter, list[str]]:
    """Counts of outcomes and lines about faults. originals: name → (directory, {door: expected values or None})."""
    counts: collections.Counter = collections.Counter()
    faults = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            if seconds is not None and time.monotonic() - start > seconds:
                break
            chance = random.Random(seed)
            name = chance.choice(sorted(originals))
            original, doors = originals[name]
            folder = Path(place) / "mutant"
            shutil.copytree(original, folder)
            kind = chance.choice(sorted(MUTANTS))
            change = MUTANTS[kind](folder, chance)
            for door, expected in doors.items():
                result = outcome(door, folder, expected, kind)
                counts[result.split(":")[0]] += 1
                if result.startswith("FAULT"):
                    faults.append(f"seed {seed}: {name}, {door.__name__}, {change}: {result}")
            shutil.rmtree(folder)
    return counts, faults


def make_originals(home: Path) -> dict:
    """A tiny packed language model and a tiny packed sentence encoder, with the values that each door gives."""
    import zoo
    from conftest import make_tokenizer
    from test_loading import packed_model, save

    llama = save(packed_model("llama", group_size=16), home / "llama", group_size=16)
    make_tokenizer().save_pretrained(llama)
    bert = save(packed_model("bert", group_size=16), home / "bert", group_size=16)
    make_tokenizer().save_pretrained(bert)
    types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    listed = [{"idx": i, "name": str(i), "path": ["", "1_Pooling"][i], "type": kind} for i, kind in enumerate(types)]
    (bert / "modules.json").write_text(json.dumps(listed))
    (bert / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    (bert / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "the "}, "default_prompt_name": None}))
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, "include_prompt": True}))
    assert zoo is not None
    with torch.no_grad():
        return {
            "llama": (llama, {language_model: language_model(llama), converted: None, looked_at: None}),
            "bert": (bert, {encoder: encoder(bert), converted: None, looked_at: None}),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=None)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as home:
        originals = make_originals(Path(home))
        counts, faults = run(originals, range(arguments.seed, arguments.seed + arguments.mutants), arguments.seconds)
    print(*faults, sep="\n")
    print(dict(counts))
    return int(bool(faults))


if __name__ == "__main__":
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests), str(tests.parent / "examples")]
    sys.exit(main())
