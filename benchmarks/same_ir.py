"""The LLVM IR of every CPU kernel, one hash a line: what a change of the generator's own code must
not change.

    PYTHONPATH=BEFORE python benchmarks/same_ir.py > before.txt
    PYTHONPATH=AFTER  python benchmarks/same_ir.py > after.txt
    diff before.txt after.txt

`--text DIRECTORY` also writes each kernel's text. Names of functions are numbered first, so that a
kernel may be renamed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import re
from pathlib import Path

import torch

from awq.kernels.cpu.engine import kernel_module
from awq.kernels.cpu.targets import TARGETS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SWITCH = (False, True)


def kernels():
    """(name, emitter, dtype, settings) of every kernel in every form."""
    products = importlib.import_module("awq.kernels.cpu.products")
    decoding = importlib.import_module("awq.kernels.cpu.decoding")
    dense = importlib.import_module("awq.kernels.cpu.dense")
    dequantize = getattr(dense, "emit_dequantize", None) or dense.emit_dense
    for dtype in DTYPES:
        for target, planes in itertools.product(TARGETS, (1, 2, 3)):
            yield f"linear.{target.name}.{planes}", products.emit_linear, dtype, (target, planes)
        for flags in itertools.product(SWITCH, repeat=4):
            yield f"add_norm.{flags}", decoding.emit_add_norm, dtype, flags
            yield f"attend.{flags}", decoding.emit_attend, dtype, flags
        for name, gated in itertools.product(
            ("silu", "gelu", "gelu_tanh", "relu", "relu2"), SWITCH
        ):
            yield f"activate.{name}.{gated}", decoding.emit_activate, dtype, (name, gated)
        yield "dense", decoding.emit_dense, dtype, ()
        yield "dequantize", dequantize, dtype, ()


def without_names(text: str) -> str:
    """The text with its functions numbered by their first appearance; LLVM's own keep their
    names."""
    names: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f'@"{len(names)}"')

    return re.sub(r'@"(?!llvm\.)[^"]+"', number, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, help="also write the text of each kernel into this directory"
    )
    args = parser.parse_args()
    for name, emit, dtype, settings in kernels():
        for openmp in SWITCH:
            text = without_names(str(kernel_module(emit, dtype, settings, openmp)[0]))
            label = f"{name}.{str(dtype).removeprefix('torch.')}.{'openmp' if openmp else 'parts'}"
            print(hashlib.sha256(text.encode()).hexdigest()[:16], label)
            if args.text:
                args.text.mkdir(parents=True, exist_ok=True)
                (args.text / f"{label}.ll").write_text(text)


if __name__ == "__main__":
    main()
