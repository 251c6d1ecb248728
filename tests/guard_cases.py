"""The CPU kernels on memory that ends where their operands end: a byte touched outside kills.

Kernels get bare addresses, so an error of one element would go unseen in ordinary memory. Here
every tensor that the launchers take or make lies in pages of its own, with its last byte before a
page that nobody may touch (`end`), or with its first byte behind one (`start`). What the kernels
compute is compared with the reference as well: memory that is never read right would be no test.

`python tests/guard_cases.py` says what it tried; a case that leaves its operands ends the process
with a segmentation fault. `overrun` reads too far on purpose, in a process of its own: it must die.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from awq.embed import compiled
from awq.kernels import cpu as products
from awq.kernels import reference
from awq.kernels.cpu import decode_launch, dense
from awq.kernels.cpu.engine import host_target
from awq.kernels.moe import moe_linear, stack_experts
from awq.kernels.packed import Packed
from awq.kernels.specs import Norm

PAGE = mmap.PAGESIZE
NOBODY, READ_WRITE = 0, 3  # PROT_NONE, PROT_READ | PROT_WRITE
PRIVATE_MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHAPES = [(128, 64, 128), (136, 17, 136), (24, 8, 8), (192, 41, 96)]
TOKENS = (1, 2, 5, 131)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPERATOR_DTYPES = (torch.float32, torch.bfloat16)

plain_empty = torch.empty
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fence:
    """Makes tensors beside forbidden pages. side: "end" or "start", where the forbidden page is."""

    side = "end"

    def empty(self, *shape: Any, dtype: torch.dtype | None = None, **_others: Any) -> torch.Tensor:
        """A tensor with memory of its own, which stays mapped until the process ends."""
        size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.get_default_dtype()
        count = math.prod(size) * dtype.itemsize
        if count == 0:
            return plain_empty(size, dtype=dtype)
        pages = -(-count // PAGE) * PAGE
        whole = libc.mmap(None, pages + 2 * PAGE, READ_WRITE, PRIVATE_MEMORY, -1, 0)
        first, last = whole, whole + PAGE + pages
        for forbidden in (first, last):
            assert libc.mprotect(forbidden, PAGE, NOBODY) == 0, "pages cannot be protected here"
        start = last - count if self.side == "end" else first + PAGE
        memory = (ctypes.c_char * count).from_address(start)
        return torch.frombuffer(memory, dtype=dtype).view(size)

    def copy(self, tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return None
        return self.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def take_over(self) -> None:
        """From now on the launchers' own tensors lie beside forbidden pages, too."""
        torch.empty = self.empty  # type: ignore[assignment]
        torch.empty_like = lambda x: self.empty(x.shape, dtype=x.dtype)  # type: ignore[assignment]
        torch.Tensor.new_empty = (  # type: ignore[method-assign, assignment]
            lambda x, *shape, dtype=None: self.empty(*shape, dtype=dtype or x.dtype)
        )
        compiled._aligned = lambda size: (self.empty(size, dtype=torch.uint8), 0)
        compiled._Arena = lambda: _FencedArena(self)


class _FencedArena:
    """As `compiled._Arena`, each part by itself."""

    def __init__(self, fence: Fence) -> None:
        self.fence = fence

    def parts(self, sizes: dict[str, int]) -> dict[str, int]:
        values = sizes.pop("scratch_values")
        self.kept = {n: self.fence.empty(size, dtype=torch.uint8) for n, size in sizes.items()}
        for part in self.kept.values():
            part.zero_()
        return {name: part.data_ptr() for name, part in self.kept.items()} | {
            "scratch_values": values
        }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def fenced_weight(fence: Fence, shape: tuple[int, int, int]) -> tuple[Packed, torch.Tensor]:
    """(a packed weight of forbidden neighbours, the same weight dense in float64)."""
    from test_cpu import pack, random_weight

    weight = random_weight(*shape)
    packed = pack(weight)
    tensors = (fence.copy(t) for t in (packed.qweight, packed.qzeros, packed.scales))
    return Packed(*tensors, packed.shape, packed.layout), weight.dequantize().double()


def product_cases(fence: Fence) -> Iterator[tuple[str, float]]:
    for shape in SHAPES:
        packed, weight = fenced_weight(fence, shape)
        for dtype, planes in ((d, p) for d in ROUNDING for p in (products.PLANES[d], 1)):
            compute, worst = products.product(dtype, planes), 0.0
            bias = fence.copy(torch.randn(shape[1]).to(dtype))
            for tokens in TOKENS:
                x = fence.copy(torch.randn(tokens, shape[0]).to(dtype))
                y = compute(x, packed, bias)
                worst = max(worst, relative(y, x.double() @ weight.t() + bias.double()))
            yield f"product {shape} {dtype} {planes} planes", worst - (3e-2 if planes == 1 else 0)
        rows = dense.dequantized(packed, 0, shape[1])
        yield f"dense weight {shape}", relative(rows, weight)


def expert_cases(fence: Fence) -> Iterator[tuple[str, float]]:
    """`awq::moe_linear`: the first and the last expert lie beside the forbidden pages."""
    inputs, outputs, size = shape = SHAPES[-1]
    each = [fenced_weight(fence, shape) for _ in range(3)]
    stacked = stack_experts([packed for packed, _ in each])
    tensors = (fence.copy(tensor) for tensor in stacked[:3])
    packed = Packed(*tensors, stacked.shape, stacked.layout)
    weights = torch.stack([weight for _, weight in each])
    bias = fence.copy(torch.randn(3, outputs))
    for tokens, dtype in product((1, 7), (torch.float32, torch.bfloat16)):
        x = fence.copy(torch.randn(tokens, inputs).to(dtype))
        chosen = fence.copy(torch.tensor([[0, 2], [2, 1]]).repeat(tokens, 1)[:tokens])
        y = moe_linear(x, packed, chosen, bias=bias.to(dtype))
        rows = torch.einsum("ti,tkoi->tko", x.double(), weights[chosen])
        worst = relative(y, rows + bias.to(dtype).double()[chosen])
        yield f"experts, {tokens} tokens, {dtype}, groups of {size}", worst


def operator_cases(fence: Fence) -> Iterator[tuple[str, float]]:
    for width in (8, 33, 100):
        for dtype in OPERATOR_DTYPES:
            x, branch = (fence.copy(torch.randn(3, width).to(dtype)) for _ in range(2))
            for mean, biased in ((False, False), (True, True)):
                weight = fence.copy(torch.randn(width))
                norm = Norm(weight, fence.copy(torch.randn(width)) if biased else None, 1e-5, mean)
                found = decode_launch.add_norm(x, branch, 0.5, norm)
                want = reference.decode.add_norm(x, branch, 0.5, norm)
                worst = max(relative(a, b) for a, b in zip(found, want))
                yield f"norm {width} {dtype} {mean}", worst
            for name, gated in (("silu", True), ("gelu", False)):
                h = fence.copy(torch.randn(3, 2 * width).to(dtype))
                y = decode_launch.activate(h, name, gated)
                want = reference.decode.activate(h, name, gated)
                yield f"{name} {width} {dtype}", relative(y, want)
            head = fence.copy(torch.randn(21, width).to(dtype))
            y = decode_launch.dense(x, head)
            yield f"head {width} {dtype}", relative(y, x.double() @ head.double().t())


def attention_cases(fence: Fence) -> Iterator[tuple[str, float]]:
    from decoding_cases import ATTENTIONS

    for name, (a, lengths) in ATTENTIONS.items():
        for dtype in OPERATOR_DTYPES:
            if a.q_norm is not None and a.k_norm is not None:
                scales = (fence.copy(1 + 0.2 * torch.randn(a.head_dim)) for _ in range(2))
                q_norm, k_norm = (
                    replace(norm, weight=scale) for norm, scale in zip((a.q_norm, a.k_norm), scales)
                )
                a = replace(a, q_norm=q_norm, k_norm=k_norm)
            places = max(lengths) + 1
            width = (a.heads + 2 * a.kv_heads) * a.head_dim
            qkv = fence.copy(torch.randn(len(lengths), width).to(dtype))
            size = (len(lengths), a.kv_heads, places, a.head_dim)
            caches = [torch.randn(size).to(dtype) for _ in range(2)]
            angles = torch.rand(places, a.rotary // 2)
            tables = [fence.copy(t) if a.rotary else None for t in (angles.cos(), angles.sin())]
            at = fence.copy(torch.tensor(lengths, dtype=torch.int32))
            ours = [fence.copy(cache) for cache in caches]
            y = decode_launch.attend(qkv, a, *tables, at, *ours, max(lengths))
            want = reference.decode.attend(qkv, a, *tables, at, *caches, max(lengths))
            yield f"attention, {name}, {dtype}", relative(y.flatten(), want.flatten())


def encoder_cases(fence: Fence) -> Iterator[tuple[str, float]]:
    from test_compiled_encoder import available, expected, quantized, texts

    from awq.embed.structure import read_encoder

    for family in ("mpnet", "qwen3"):  # relative positions; angles, grouped heads, gates
        if not available(family):
            continue
        model = quantized(family)
        encoder = compiled.CompiledEncoder(read_encoder(model), "mean", False)
        rows = texts((1, 2, 15, 17, 70))
        found = encoder(rows)
        yield (
            f"encoder {family}",
            max(relative(a, expected(model, r)) for a, r in zip(found, rows)),
        )


def overrun(fence: Fence) -> None:
    """A weight whose last block is missing: the kernel reads beyond it."""
    packed, _ = fenced_weight(fence, SHAPES[0])
    short = packed._replace(qweight=fence.copy(packed.qweight[:-1]))
    products.product(torch.float32, 3)(fence.copy(torch.randn(1, 128)), short, None)


def felt(fence: Fence) -> bool:
    """Whether a kernel that reads too far dies of it. Called before any other: the forked process
    has none of the threads that kernels run on."""
    child = os.fork()
    if child == 0:
        overrun(fence)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV


CASES: tuple[Callable[[Fence], Iterator[tuple[str, float]]], ...] = (
    product_cases,
    expert_cases,
    operator_cases,
    attention_cases,
    encoder_cases,
)


def main() -> int:
    """Prints what was tried; returns how many results were wrong."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    fence = Fence()
    fence.take_over()
    print(f"kernels for {host_target()}", flush=True)
    print(f"the fence is {'felt' if felt(fence) else 'not felt'}", flush=True)
    faulthandler.enable()
    tried, wrong = 0, 0
    with torch.no_grad():
        for cases, fence.side in product(CASES, ("end", "start")):
            for name, error in cases(fence):
                tried += 1
                if not error < max(ROUNDING.values()):
                    wrong += 1
                    print(f"WRONG {name}, {fence.side}: {error:.1e}")
    print(f"{tried} cases, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main()))
