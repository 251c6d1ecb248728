"""Changes to a checkpoint that a seed decides: what broken disks, other tools, half downloads and
strangers do to files.

Each function changes one thing in a directory and says what it did. `changes_values` tells whether
numbers may honestly
differ afterwards: a JSON setting may ask for something else, while a tensor that is renamed or
missing may not.
"""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ODD_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2.5,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    float("nan"),
    10**9,
    "../x",
    "\x00",
    "\u202e",
]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
]
HEADER_DTYPES = ["F16", "F32", "I32", "BF16", "U8", "X9", 7]
MAX_FLIPPED_PLACE = 4000  # bytes from the start of a file: headers and settings lie there
MARKER = "code-was-run"  # a file that code of a mutant would write
PROGRAM = f"import pathlib\npathlib.Path(__file__).with_name('{MARKER}').touch()\n"


def mutate(folder: Path, chance: random.Random) -> tuple[str, str]:
    """Changes the checkpoint in `folder`; returns (kind of change, what was done)."""
    kind = chance.choice(sorted(MUTATIONS))
    return kind, MUTATIONS[kind](folder, chance)


def _files(folder: Path, *endings: str) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name.endswith(endings)
    )


def change_tensor(folder: Path, chance: random.Random) -> str:
    """A tensor is missing, has another name or dtype, is cut, holds NaN, or changed places with
    another one."""
    path = chance.choice(_files(folder, ".safetensors"))
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    how = chance.choice(sorted(TENSOR_CHANGES))
    tensors |= TENSOR_CHANGES[how](name, tensors, chance)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "pt"}
    )
    return f"{how} {name} in {path.relative_to(folder)}"


def _drop(name: str, tensors: dict, chance: random.Random) -> dict:
    del tensors[name]
    return {} if tensors else {"nothing": torch.zeros(1)}


def _rename(name: str, tensors: dict, chance: random.Random) -> dict:
    place = chance.randrange(len(name))
    new = name[:place] + chance.choice("abxyz.019_") + name[place + 1 :]
    return {new: tensors.pop(name)}


def _cast(name: str, tensors: dict, chance: random.Random) -> dict:
    return {name: tensors[name].to(chance.choice(DTYPES))}


def _cut(name: str, tensors: dict, chance: random.Random) -> dict:
    return {name: tensors[name][: max(1, len(tensors[name]) // 2)].clone()}


def _reshape(name: str, tensors: dict, chance: random.Random) -> dict:
    """Another shape; of a square one, whose transpose nobody could tell, the transpose is left
    out."""
    tensor = tensors[name]
    shapes = [tensor.flatten(), tensor.unsqueeze(0), tensor.transpose(0, -1).clone()]
    return {name: chance.choice([new for new in shapes if new.shape != tensor.shape])}


def _spoil(name: str, tensors: dict, chance: random.Random) -> dict:
    spoiled = tensors[name].clone()
    if spoiled.is_floating_point():
        spoiled.view(-1)[chance.randrange(spoiled.numel())] = chance.choice(
            [float("nan"), float("inf")]
        )
    return {name: spoiled}


def _add(name: str, tensors: dict, chance: random.Random) -> dict:
    return {f"{name}{chance.choice(['_more', '.qweight', '.scales', '.1'])}": torch.ones(2)}


def _swap(name: str, tensors: dict, chance: random.Random) -> dict:
    """Two tensors change names; those alike in shape and dtype are left, since nobody could
    tell."""
    other = chance.choice(sorted(tensors))
    if tensors[other].shape == tensors[name].shape and tensors[other].dtype == tensors[name].dtype:
        return {}
    return {name: tensors[other], other: tensors[name]}


TENSOR_CHANGES = {
    "drop": _drop,
    "rename": _rename,
    "cast": _cast,
    "cut": _cut,
    "reshape": _reshape,
    "spoil": _spoil,
    "add": _add,
    "swap": _swap,
}


def change_header(folder: Path, chance: random.Random) -> str:
    """The header of a weight file says another shape, dtype or place than the bytes have."""
    path = chance.choice(_files(folder, ".safetensors"))
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = chance.choice(sorted(key for key in header if key != "__metadata__"))
    entry = header[name]
    field = chance.choice(["dtype", "shape", "data_offsets", "length"])
    if field == "dtype":
        # One 16-bit float told as the other is another valid file, which nobody could tell.
        odd = [d for d in HEADER_DTYPES if {d, entry[field]} != {"F16", "BF16"}]
        entry[field] = chance.choice(odd)
    elif field == "length":
        length = chance.choice([0, 1, length * 2, 2**40, 2**63])
    else:
        place = chance.randrange(max(1, len(entry[field])))
        entry[field] = [
            *entry[field][:place],
            chance.choice([0, 1, 2**31, 2**62, -1]),
            *entry[field][place + 1 :],
        ]
    text = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text) if field != "length" else length)
        + text
        + data[8 + len(text) :][:0]
    )
    with path.open("ab") as file:
        file.write(data[8 + struct.unpack("<Q", data[:8])[0] :])
    return f"header {field} of {name}"


def change_setting(folder: Path, chance: random.Random) -> str:
    """A key of a settings file has an odd value, or is missing."""
    path = chance.choice(_files(folder, ".json"))
    content = json.loads(path.read_text())
    places = list(_places(content))
    if not places:
        return "nothing"
    parent, key = chance.choice(places)
    value = chance.choice([*ODD_VALUES, "drop"])
    if value == "drop":
        del parent[key]
    else:
        parent[key] = value
    path.write_text(json.dumps(content))
    return f"{path.relative_to(folder)}: {key} = {value!r}"


def _places(content: Any):
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield content, key
        yield from _places(value)


def change_bytes(folder: Path, chance: random.Random) -> str:
    """A bit is flipped, or the end of a file is missing."""
    path = chance.choice([path for path in _files(folder, "") if path.stat().st_size])
    data = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        data = data[: chance.randrange(len(data))]
        what = f"cut at {len(data)}"
    else:
        place = chance.randrange(min(len(data), MAX_FLIPPED_PLACE))
        data[place] ^= 1 << chance.randrange(8)
        what = f"flip at {place}"
    path.write_bytes(data)
    return f"{path.relative_to(folder)} {what}"


def change_file(folder: Path, chance: random.Random) -> str:
    """A file is missing, a folder, a pipe, a link to elsewhere, or another one lies beside it."""
    path = chance.choice(_files(folder, ""))
    how = chance.choice(
        ["missing", "folder", "pipe", "outside", "dangling", "loop", "empty", "copy", "nested"]
    )
    if how == "copy":
        path.with_name(f"model-{chance.randrange(9)}{path.suffix}").write_bytes(path.read_bytes())
    elif how == "nested":
        path.write_text("[" * 100_000)
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how in ("outside", "dangling", "loop"):
        path.symlink_to(
            {"outside": "/etc/hostname", "dangling": "/nowhere/at/all", "loop": path.name}[how]
        )
    elif how == "empty":
        path.touch()
    return f"{how} {path.relative_to(folder)}"


def add_code(folder: Path, chance: random.Random) -> str:
    """Programs of a stranger, and the settings that ask for them: none may run."""
    config = json.loads((folder / "config.json").read_text())
    kind = chance.choice(["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"])
    name = chance.choice(
        ["stranger.Stranger", "../stranger.Stranger", "else/where--stranger.Stranger"]
    )
    config["auto_map"] = {kind: name}
    if chance.random() < 0.5:
        config["model_type"] = "stranger"
    (folder / "config.json").write_text(json.dumps(config))
    for file in (
        "stranger.py",
        "modeling_stranger.py",
        "__init__.py",
        "transformers.py",
        "sitecustomize.py",
    ):
        (folder / file).write_text(PROGRAM)
    torch.save(
        {"weight": _Payload()},
        folder / chance.choice(["pytorch_model.bin", "adapter_model.bin", "training_args.bin"]),
    )
    return f"code as {kind}: {name}"


class _Payload:
    """Unpickled, it would run a program."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


MUTATIONS = {
    "tensor": change_tensor,
    "header": change_header,
    "setting": change_setting,
    "bytes": change_bytes,
    "file": change_file,
    "code": add_code,
}
# Kinds after which a value that is given at all must be the right one. Settings may ask for another
# model; a flipped bit may lie in a number.
KEEP_VALUES = {"tensor", "header", "code"}
