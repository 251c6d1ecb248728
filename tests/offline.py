"""Compiling the kernels for a GPU that is not there: for tests, and for
`benchmarks/kernels_offline.py`.

Triton brings the assembler of every NVIDIA target and AMD's compiler. Without a GPU there is no
driver to ask, so targets are
named: 80, 90 … are compute capabilities, "gfx942" … AMD's architectures.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awq.formats.planar import padded
from awq.kernels.packed import Shape
from awq.kernels.triton.configs import GATE_INTERLEAVE, Config
from awq.kernels.triton.direct_launch import Direct, _blocks

TARGETS: tuple[int | str, ...] = (80, 86, 89, 90, 100, "gfx90a", "gfx942", "gfx1100")
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


class Code(NamedTuple):
    """What a compiled kernel uses. Registers per thread; spilled: bytes of stack (NVIDIA),
    registers (AMD)."""

    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]  # opcodes of the longest loop (NVIDIA only)
    binary: bytes


def compile_product(
    target: int | str,
    shape: Shape,
    config: Config,
    dtype: torch.dtype = torch.float16,
    bias: bool = False,
    gated: str = "",
) -> Code:
    """The product kernel as `matmul_launch.fused` would compile it on `target`. Raises what Triton
    raises."""
    from awq.kernels.triton.matmul import matmul_kernel

    nvidia = isinstance(target, int)
    x = _POINTERS[dtype]
    arguments = {
        "x": x,
        "qweight": "*i16",
        "grid": "*i32",
        "bias": x,
        "y": x,
        "partial": "*fp32" if config.split > 1 else x,
        "arrived": "*i32" if config.split > 1 else x,
        "M": "i32",
    }
    constants = {
        "N": shape.out_features,
        "K": shape.in_features,
        "GROUP": shape.group_size,
        "NP": padded(*shape[:2])[1],
        "BM": config.bm,
        "BN": config.bn,
        "SPLIT": config.split,
        "SCALE_WEIGHT": config.scale_weight,
        "HAS_BIAS": bias,
        "ASM": nvidia,
        "PDL": starts_early(target),
        "AHEAD": config.ahead(shape.in_features),
        "GATED": gated,
        "INTERLEAVE": GATE_INTERLEAVE,
    }
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_kernel(matmul_kernel, target, arguments, constants, options)


def compile_dequantize(target: int | str, shape: Shape, dtype: torch.dtype = torch.float16) -> Code:
    """The dequantizing kernel as `matmul_launch.dequantize` would compile it on `target`."""
    from awq.kernels.triton.matmul import dequantize_kernel

    arguments = {
        "qweight": "*i16",
        "grid": "*i32",
        "dense": _POINTERS[dtype],
        "first": "i32",
        "N": "i32",
    }
    constants = {
        "K": shape.in_features,
        "GROUP": shape.group_size,
        "NP": padded(*shape[:2])[1],
        "BN": 64,
    }
    constants["PDL"] = starts_early(target)
    return compile_kernel(dequantize_kernel, target, arguments, constants, {"num_warps": 4})


def compile_experts(
    target: int | str,
    shape: Shape,
    config: Config,
    rows: int | None,
    dtype: torch.dtype = torch.float16,
    top: int = 2,
    gated: str = "",
    ahead: int = 0,
) -> Code:
    """The kernel of a mixture of experts as `expert_launch.fused` would compile it: for so many
    rows, or sorted ones (None); 1 stands for those of one token."""
    from awq.kernels.triton.experts import expert_kernel

    nvidia, x = isinstance(target, int), _POINTERS[dtype]
    order = "*i64" if rows else "*i32"
    arguments = {
        "x": x,
        "qweight": "*i16",
        "grid": "*i32",
        "bias": x,
        "factors": x,
        "experts": "*i64",
        "order": order,
        "owner": order,
        "y": x,
        "partial": "*fp32" if config.split > 1 else x,
        "arrived": "*i32" if config.split > 1 else x,
        "R": "i32",
        "E": "i32",
    }
    constants = {
        "TOP": top,
        "N": shape.out_features,
        "K": shape.in_features,
        "GROUP": shape.group_size,
        "GROUPS": shape.in_features // shape.group_size,
        "NP": padded(*shape[:2])[1],
        "BM": config.bm,
        "BN": config.bn,
        "SPLIT": config.split,
        "SCALE_WEIGHT": config.scale_weight,
        "ROWS": 0 if not rows else 1 if rows == 1 else max(16, 1 << (rows - 1).bit_length()),
        "HAS_BIAS": True,
        "HAS_FACTORS": True,
        "GATED": gated,
        "ALTERNATING": False,
        "INTERLEAVE": GATE_INTERLEAVE,
        "AHEAD": ahead,
        "ASM": nvidia,
        "PDL": starts_early(target),
    }
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    return compile_kernel(expert_kernel, target, arguments, constants, options)


def compile_direct(
    target: int,
    shape: Shape,
    form: Direct,
    dtype: torch.dtype = torch.float16,
    kind: str = "product",
    gated: str = "",
    top: int = 8,
) -> Code:
    """A kernel for one token as `direct_launch` would compile it on `target`. kind: "product", of a
    linear; "experts", gate and up with an activation, else down; "sum", down and the sum."""
    from awq.kernels.triton import direct

    x, experts = _POINTERS[dtype], shape.in_features // shape.group_size
    blocks = _blocks(shape.in_features * (top if kind == "sum" else 1), form.warps)
    arguments = {"x": x, "qweight": "*i16", "grid": "*i32", "bias": x}
    constants: dict[str, Any] = {
        "N": shape.out_features,
        "K": shape.in_features,
        "GROUP": shape.group_size,
        "NP": padded(*shape[:2])[1],
        "TP": blocks,
        "BN": form.bn,
        "HAS_BIAS": True,
        "WARPS": form.warps,
        "PDL": starts_early(target),
    }
    if kind == "product":
        kernel = direct.direct_kernel
        arguments |= {"y": x}
        constants |= {"GATED": gated, "RUN": GATE_INTERLEAVE}
    else:
        arguments |= {"factors": "*fp32", "experts": "*i32", "y": x}
        constants |= {"GROUPS": experts, "BEFORE": not gated}
        if kind == "sum":
            kernel = direct.direct_expert_sum_kernel
            arguments |= {"E": "i32"}
            constants |= {"TOP": top}
        else:
            kernel = direct.direct_expert_kernel
            arguments |= {"R": "i32", "E": "i32"}
            constants |= {"TOP": top if gated else 1, "HAS_FACTORS": not gated}
            constants |= {"GATED": gated, "RUN": 0}
    in_order = {name: constants[name] for name in kernel.arg_names if name in constants}
    return compile_kernel(kernel, target, arguments, in_order, form.options())


def compile_route(target: int | str, experts: int, bm: int) -> Code:
    """The kernel that sorts rows by expert as `expert_launch.route` would compile it."""
    from awq.kernels.triton.experts import route_kernel

    arguments = {
        "experts": "*i64",
        "order": "*i32",
        "owner": "*i32",
        "R": "i32",
        "E": "i32",
        "BLOCKS": "i32",
    }
    constants = {"BINS": 1 << experts.bit_length(), "BM": bm, "CHUNK": 1024}
    constants["PDL"] = starts_early(target)
    return compile_kernel(
        route_kernel,
        target,
        arguments,
        constants,
        {"num_warps": 4},
    )


def starts_early(target: int | str) -> bool:
    """Whether a kernel may start before the one in front has ended, as
    `launcher.has_dependent_launch` finds on the device."""
    return isinstance(target, int) and target >= 90


def compile_kernel(
    kernel: Any, target: int | str, arguments: dict, constants: dict, options: dict
) -> Code:
    """Any kernel for `target`.

    arguments: name → type of pointers and numbers, "*fp32" or "i32"; "i32 16" is a number that 16
    divides, as all pointers are
    taken to be. constants: name → value of constexpr arguments; options: num_warps, num_stages.
    Raises what Triton raises.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    if isinstance(target, int):
        gpu = GPUTarget("cuda", target, 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    signature = {name: kind.split()[0] for name, kind in arguments.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    names = list(signature)
    aligned: dict = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(arguments.values())
        if kind.startswith("*") or kind.endswith(" 16")
    }
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    if constants.get("PDL"):
        options = options | {"launch_pdl": True}
    compiled = compile(source, target=gpu, options=options)
    if not isinstance(target, int):
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        if registers is None or spilled is None:
            raise RuntimeError("the assembly tells no resource usage")
        return Code(
            int(registers.group(1)),
            int(spilled.group(1)),
            compiled.metadata.shared,
            (),
            compiled.asm["hsaco"],
        )
    listing, usage = _disassemble(compiled.asm["cubin"])
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {usage[:200]!r}")
    return Code(
        int(registers.group(1)),
        int(stack.group(1)),
        compiled.metadata.shared,
        longest_loop(listing),
        compiled.asm["cubin"],
    )


def _disassemble(binary: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(binary)
        commands = ([f"{tools}/nvdisasm", "-c", path], [f"{tools}/cuobjdump", "-res-usage", path])
        found = [
            subprocess.run(command, capture_output=True, text=True, check=True)
            for command in commands
        ]
    return found[0].stdout, found[1].stdout + found[1].stderr


def longest_loop(listing: str) -> tuple[str, ...]:
    """Opcodes between a label and the farthest branch back to it."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    best: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_\S+):", line)
        if label:
            labels[label.group(1)] = len(lines)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*(.*?);", line)
        if instruction:
            lines.append(instruction.group(1))
            back = re.search(r"BRA.*`\((\.L_\S+?)\)", instruction.group(1))
            if back and back.group(1) in labels and len(lines) - labels[back.group(1)] > len(best):
                best = lines[labels[back.group(1)] :]
    return tuple(line.split()[0] for line in best)
