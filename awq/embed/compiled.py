"""An encoder as one native program for the CPU at hand: built from what `structure` reads, proven,
then used.

`compile_encoder` gives a `CompiledEncoder` or raises `NotReadable` with the reason. The proof runs
texts of several lengths, one token among them, through transformers' forward and through the
program; what differs by more than rounding is refused. `kernels.cpu.encoder_kernels` says what the
program does.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from awq.embed.attention import AttentionPlan
from awq.embed.observe import NotReadable
from awq.embed.structure import EncoderPlan, read_encoder
from awq.kernels.specs import Norm
from awq.nn.linear import WQLinear

PLANES = {"exact": 2, "int8": 1}  # bytes of an activation
PROOF_LENGTHS = (1, 7, 16, 33, 70)
MAX_PROVEN_WINDOW = 256  # wider ones would need long texts to prove
# Relative error of embeddings. What transformers rounds to 16 bits in every layer, the program
# keeps in float32.
PROOF_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PROOF_ERROR_OF_BYTES = 0.12  # a cosine of 0.993 of the rarest texts, random words
LINE = 64  # bytes of a cache line
HUGE_PAGE = 14  # MADV_HUGEPAGE
MAX_KEPT_ARENAS = 4
MAX_GROUP = 256  # inputs whose integer sums fit 32 bits


@dataclass(frozen=True)
class CompiledState:
    """Whether texts run through the native program, and if not, why."""

    active: bool
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.active


class CompiledEncoder:
    """Embeddings [texts, hidden] of token ids, packed one text after the other."""

    def __init__(
        self, plan: EncoderPlan, pooling: str, normalize: bool, precision: str = "exact"
    ) -> None:
        self.plan = plan
        self.spec = _spec(plan, pooling, normalize, PLANES[precision])
        self._weights = _Weights(plan, self.spec)
        self._forward, self._pool = _program(plan.words.dtype, self.spec)
        self._arenas: list[_Arena] = []
        self._teams: dict[int, _Team] = {}  # by the size of a call

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        types: Sequence[Sequence[int]] | None = None,
        prompt_tokens: int = 0,
        helpers: int | None = None,
    ) -> Tensor:
        """float32 [texts, hidden] of rows of token ids. types: their token types. prompt_tokens:
        leading ones not pooled.

        helpers: at most so many threads beside the caller's own; they come when they have made such
        calls quicker.
        """
        lengths = [len(row) for row in rows]
        tokens = sum(lengths)
        ids = np.fromiter((i for row in rows for i in row), np.int32, tokens)
        if tokens == 0 or min(lengths) == 0 or max(lengths) > self.plan.longest:
            raise ValueError(
                f"texts have {min(lengths)} to {max(lengths)} tokens; 1 to {self.plan.longest} "
                "are possible."
            )
        if ids.min() < 0 or ids.max() >= len(self.plan.words):
            raise ValueError(
                f"token ids are {ids.min()} to {ids.max()}; the table has {len(self.plan.words)} "
                "words."
            )
        kinds = (
            np.zeros(tokens, np.int32)
            if types is None
            else np.fromiter((i for row in types for i in row), np.int32)
        )
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        positions = (
            np.arange(tokens, dtype=np.int32)
            - np.repeat(starts[:-1], lengths)
            + self.plan.position_offset
        )
        out = torch.empty(len(rows), self.spec.hidden)
        helpers = min(
            self._pool.helpers if helpers is None else helpers,
            self._pool.helpers,
            torch.get_num_threads() - 1,
        )
        team = self._teams.setdefault(tokens.bit_length(), _Team()) if helpers else None
        if team is not None and not team.is_worth_it():
            helpers = 0
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = _Arena()
        parts = arena.parts(_sizes(self.spec, tokens, max(lengths), helpers + 1))
        arrays = dict(ids=ids, positions=positions, types=kinds, starts=starts)
        began = time.perf_counter()
        self._run(arena, parts, arrays, len(rows), tokens, prompt_tokens, helpers, out)
        if team is not None:
            team.note(helpers > 0, (time.perf_counter() - began) / tokens)
        if len(self._arenas) < MAX_KEPT_ARENAS:
            self._arenas.append(arena)
        return out

    def why_not(self, rows: Sequence[Sequence[int]]) -> str | None:
        """Why these rows of token ids must go through transformers' forward; None when they need
        not."""
        longest = max(map(len, rows))
        if longest > self.plan.longest:
            return f"a text has {longest} tokens, and positions end at {self.plan.longest}"
        # Families that begin to count positions after the padding's own give a padding word no
        # position of its own.
        padding = self.plan.position_offset - 1
        if self.plan.position_offset and any(padding in row for row in rows):
            return "a text holds the padding token"
        return None

    def _run(
        self,
        arena: _Arena,
        parts: dict[str, int],
        arrays: dict[str, Any],
        texts: int,
        tokens: int,
        prompt_tokens: int,
        helpers: int,
        out: Tensor,
    ) -> None:
        from awq.kernels.cpu.encoder_kernels import JOB

        fields = dict(
            self._weights.fields,
            **{name: array.ctypes.data for name, array in arrays.items()},
            **parts,
            tokens=tokens,
            texts=texts,
            max_distance=self._weights.max_distance,
            prompt_tokens=prompt_tokens,
            out=out,
        )
        counters = 8 * 8 * self.spec.phases
        ctypes.memset(parts["counters"], 0, counters)
        if helpers:
            job = ctypes.create_string_buffer(JOB.pack(workers=helpers + 1, **fields))
            if self._pool.run(ctypes.addressof(job), helpers):
                return
        job = ctypes.create_string_buffer(JOB.pack(workers=1, **fields))
        self._forward(ctypes.addressof(job), 0)


@cache
def _program(dtype: torch.dtype, spec: Any) -> tuple[Any, Any]:
    """(forward(job, worker), its pool), compiled once in a process for all encoders of the same
    shape."""
    from awq.kernels.cpu import engine
    from awq.kernels.cpu.encoder_kernels import POOL_FIELDS, POOL_SEMAPHORE, emit_encoder
    from awq.kernels.cpu.pool import Pool, helpers_for_this_process

    target = engine.host_target()
    if target is None:
        raise NotReadable("the CPU has no AVX2, AVX-512 or Arm dot products")
    code = engine.native_module(emit_encoder, dtype, target, spec)
    forward = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(code.address("forward"))
    pool = Pool(
        code.address("serve"),
        code.address("call"),
        helpers_for_this_process(),
        POOL_FIELDS,
        POOL_SEMAPHORE,
    )
    return forward, pool


def compile_encoder(
    model: Any, pooling: str, normalize: bool, precision: str = "exact"
) -> CompiledEncoder:
    """Reads, builds and proves. Raises NotReadable with the reason, ImportError without
    llvmlite."""
    compiled = CompiledEncoder(read_encoder(model), pooling, normalize, precision)
    prove(compiled, model)
    return compiled


@torch.no_grad()
def prove(compiled: CompiledEncoder, model: Any) -> float:
    """The largest relative error against transformers' forward. Raises NotReadable when it is more
    than rounding."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(compiled.plan.words)
    low = min(5, vocabulary - 1)
    rows = [
        torch.randint(low, vocabulary, (n,), generator=generator).tolist()
        for n in _proof_lengths(compiled.plan)
    ]
    together = compiled(rows)
    worst = 0.0
    for row, found in zip(rows, together):
        ids = torch.tensor([row])
        hidden = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()
        )
        expected = _pooled(hidden, compiled.spec.pooling)
        if compiled.spec.normalize:
            expected = F.normalize(expected, dim=-1)
        error = float((found - expected).norm() / expected.norm())
        worst = max(worst, error if error == error else float("inf"))
    allowed = PROOF_ERROR.get(compiled.plan.words.dtype, 1e-3)
    if compiled.spec.planes == 1:
        allowed = max(allowed, PROOF_ERROR_OF_BYTES)
    if worst > allowed:
        raise NotReadable(
            f"the compiled program differs from transformers' forward by {worst:.2g} (allowed: "
            f"{allowed:.2g})"
        )
    return worst


def _proof_lengths(plan: EncoderPlan) -> list[int]:
    """Tokens of the texts of a proof, one of them beyond every narrow window."""
    windows = [b.attention.window for b in plan.blocks]
    beyond = [
        2 * window + 9 for window in windows if window is not None and window <= MAX_PROVEN_WINDOW
    ]
    return sorted({min(length, plan.longest) for length in (*PROOF_LENGTHS, *beyond)})


def _pooled(hidden: Tensor, pooling: str) -> Tensor:
    return {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]


def _spec(plan: EncoderPlan, pooling: str, normalize: bool, planes: int) -> Any:
    from awq.kernels.cpu.encoder_kernels import EncoderSpec

    block = plan.blocks[0]
    hidden = plan.words.shape[1]
    attention = block.attention
    group = _group_size(plan)
    pairs = 0 if attention.rotary is None else attention.rotary[0].shape[1]
    _check_multiples(
        {
            "the group": (group, 16),
            "a head's dimension": (attention.dim, 16),
            "the hidden width": (hidden, 16),
            "the number of pairs that rotate": (pairs, 8),
        }
    )
    norms = [n for b in plan.blocks for n in (b.attention_norm, b.mlp_norm) if n is not None]
    norms += [n for n in (plan.norm, plan.final_norm) if n is not None]
    norms += [n for b in plan.blocks for n in b.post_norms or ()]
    if len({(n.eps, n.centered) for n in norms}) != 1:
        raise NotReadable("its norms are of several kinds")
    if len({_kind(b.attention) for b in plan.blocks}) != 1:
        raise NotReadable("its blocks attend in several ways")
    head_norm = attention.q_norm
    return EncoderSpec(
        hidden=hidden,
        inner=block.down.in_features,
        heads=plan.heads,
        kv_heads=attention.kv_heads,
        dim=attention.dim,
        layers=len(plan.blocks),
        group=group,
        planes=planes,
        eps=norms[0].eps,
        scaling=attention.scaling,
        activation=block.activation,
        gated=block.gated,
        centered=norms[0].centered,
        pre_norm=block.pre_norm,
        post_norms=block.post_norms is not None,
        words_factor=plan.words_factor,
        embedding_norm=plan.norm is not None,
        rotary=pairs,
        relative=plan.relative is not None,
        causal=attention.causal,
        windowed=any(b.attention.window is not None for b in plan.blocks),
        qk_norm=head_norm is not None,
        qk_eps=0.0 if head_norm is None else head_norm.eps,
        pooling=pooling,
        normalize=normalize,
    )


def _group_size(plan: EncoderPlan) -> int:
    """Of all linears. Raises NotReadable."""
    found: set[int] = set()
    for block in plan.blocks:
        linears = (*block.attention.qkv, block.o, *block.up, block.down)
        found |= {linear.group_size for linear in linears}
    if len(found) != 1 or max(found) > MAX_GROUP:
        groups = ", ".join(map(str, sorted(found)))
        raise NotReadable(f"its linears have groups of {groups}; one size up to 256 is possible")
    return found.pop()


def _check_multiples(sizes: dict[str, tuple[int, int]]) -> None:
    """sizes: name → (size, what it must be a multiple of). Raises NotReadable."""
    for name, (size, factor) in sizes.items():
        if size % factor:
            raise NotReadable(f"{name} is {size}; multiples of {factor} are possible")


def _kind(attention: AttentionPlan) -> tuple:
    """What must be the same in all blocks.

    Raises NotReadable for norms of heads that are not computed here.
    """
    norms = (attention.q_norm, attention.k_norm)
    given = [n for n in norms if n is not None]
    if (
        len(given) == 1
        or any(n.centered or (n.bias is not None and n.bias.any()) for n in given)
        or len({n.eps for n in given}) > 1
    ):
        raise NotReadable("its queries and keys have norms of another kind than RMSNorm")
    pairs = 0 if attention.rotary is None else attention.rotary[0].shape[1]
    return (
        attention.kv_heads,
        attention.dim,
        attention.scaling,
        attention.causal,
        pairs,
        bool(given),
    )


class _Weights:
    """All weights in one piece of memory, in the order in which the program reads them."""

    def __init__(self, plan: EncoderPlan, spec: Any) -> None:
        from awq.kernels.cpu.encoder_kernels import LAYER

        self._kept: list[Tensor] = []
        self._pending: list[tuple[dict[str, Any], str, Tensor]] = []
        layers: list[dict[str, Any]] = []
        names: dict[str, Any] = {}
        for name, table in (("position_table", plan.positions), ("type_table", plan.types)):
            names[name] = self._keep(table)
        self._norm(names, "norm", plan.norm)
        first = plan.blocks[0].attention_norm if spec.pre_norm else None
        self._norm(names, "first_norm", first)
        relative = self._keep(plan.relative)
        for i, block in enumerate(plan.blocks):
            fields: dict[str, Any] = dict.fromkeys(LAYER.fields)
            for name, linears in (
                ("qkv", block.attention.qkv),
                ("o", (block.o,)),
                ("up", block.up),
                ("down", (block.down,)),
            ):
                self._linear(fields, name, linears)
            last = i + 1 == len(plan.blocks)
            after_attention: Norm | None = block.attention_norm
            after_mlp: Norm | None = block.mlp_norm
            if spec.pre_norm:
                after_attention = block.mlp_norm
                after_mlp = plan.final_norm if last else plan.blocks[i + 1].attention_norm
            self._norm(fields, "norm1", after_attention)
            self._norm(fields, "norm2", after_mlp)
            for name, post in zip(("post1", "post2"), block.post_norms or (None, None)):
                self._norm(fields, name, post)
            fields |= self._attention(block.attention)
            fields |= dict(relative=relative, keep_norm2=int(last))
            layers.append(fields)
        self._settle()
        packed = b"".join(LAYER.pack(**fields) for fields in layers)
        table = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        words = plan.words.detach().contiguous()
        self._kept += [table, words]
        self.fields = names | dict(layers=table.data_ptr(), words=words.data_ptr())
        self.max_distance = 0 if plan.relative is None else (plan.relative.shape[1] + 1) // 2

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _attention(self, attention: AttentionPlan) -> dict[str, Any]:
        from awq.kernels.cpu.encoder_kernels import NO_WINDOW

        cos, sin = attention.rotary or (None, None)
        q_norm, k_norm = attention.q_norm, attention.k_norm
        return dict(
            cos=self._keep(cos),
            sin=self._keep(sin),
            q_norm=self._keep(None if q_norm is None else q_norm.weight),
            k_norm=self._keep(None if k_norm is None else k_norm.weight),
            window=NO_WINDOW if attention.window is None else attention.window,
        )

    def _norm(self, fields: dict[str, Any], name: str, norm: Norm | None) -> None:
        fields[f"{name}_weight"] = self._keep(None if norm is None else norm.weight)
        fields[f"{name}_bias"] = self._keep(None if norm is None else norm.bias)

    def _linear(self, fields: dict[str, Any], name: str, linears: Sequence[WQLinear]) -> None:
        packed = [linear.packed.to_layout("rows16") for linear in linears]
        if len(packed) > 1 and any(p.shape.out_features % 16 for p in packed):
            raise NotReadable("a joined linear has outputs that are no multiple of 16")
        if packed[-1].shape.out_features % 16:
            raise NotReadable("a linear has outputs that are no multiple of 16")
        for field, part in (("codes", "qweight"), ("scales", "scales"), ("zeros", "qzeros")):
            joined = torch.cat([getattr(p, part).view(torch.uint8).flatten() for p in packed])
            self._pending.append((fields, f"{name}_{field}", joined))
        zeros = [torch.zeros(p.shape.out_features) for p in packed]
        biases = [
            z if linear.bias is None else linear.bias.float() for z, linear in zip(zeros, linears)
        ]
        self._pending.append((fields, f"{name}_bias", torch.cat(biases).view(torch.uint8)))

    def _settle(self) -> None:
        """Moves the linears' tensors into one block of memory, on huge pages where the system has
        them."""
        sizes = [-(-len(tensor) // LINE) * LINE for _, _, tensor in self._pending]
        memory, start = _aligned(sum(sizes))
        offset = start
        for (fields, name, tensor), size in zip(self._pending, sizes):
            memory[offset : offset + len(tensor)] = tensor
            fields[name] = memory.data_ptr() + offset
            offset += size
        self._pending.clear()
        self._kept.append(memory)


def _aligned(size: int) -> tuple[Tensor, int]:
    """(uint8 memory of more than `size` bytes, the offset in it that lies on a huge page)."""
    page = 1 << 21
    memory = torch.empty(size + 2 * page, dtype=torch.uint8)
    start = -memory.data_ptr() % page
    try:
        libc = ctypes.CDLL(None)
        libc.madvise(
            ctypes.c_void_p(memory.data_ptr() + start),
            ctypes.c_size_t(-(-size // page) * page),
            HUGE_PAGE,
        )
    except (OSError, AttributeError, TypeError):  # only faster
        pass
    return memory, start


def _sizes(spec: Any, tokens: int, longest: int, workers: int) -> dict[str, int]:
    """Bytes of everything that a call writes beside its embeddings."""
    inner = spec.inner * (2 if spec.gated else 1)
    widest = max(spec.hidden, spec.inner, spec.context)
    padded = -(-longest // 16) * 16
    scratch = (spec.dim + 8) * padded + 8 * spec.dim
    groups = widest // spec.group
    return {
        "counters": 8 * 8 * spec.phases,
        "hidden": 4 * tokens * spec.hidden,
        "planes": tokens * widest * spec.planes,
        "steps": 4 * tokens * groups,
        "sums": 4 * tokens * groups,
        "wide": 4 * tokens * max(spec.channels, inner),
        "branch": 4 * tokens * spec.hidden,
        "context": 4 * tokens * spec.context,
        "scratch": 4 * scratch * workers,
        "scratch_values": scratch,
    }


class _Team:
    """Whether helpers make a call quicker, judged by the last calls with and without them.

    On a quiet machine they do; beside busy processes a helper may wait for its core in the middle
    of its work. Which of the two it is changes by the minute, so every `RETRY_CALLS`-th call takes
    the other way.
    """

    RETRY_CALLS = 16
    NEW_SHARE = 0.25  # of the newest call in the average

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}
        self._calls = 0

    def is_worth_it(self) -> bool:
        self._calls += 1
        if len(self._seconds) < 2:
            return True not in self._seconds
        better = self._seconds[True] < self._seconds[False]
        return not better if self._calls % self.RETRY_CALLS == 0 else better

    def note(self, together: bool, seconds_per_token: float) -> None:
        before = self._seconds.get(together, seconds_per_token)
        self._seconds[together] = before + self.NEW_SHARE * (seconds_per_token - before)


class _Arena:
    """Memory of one call, kept for the next one."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def parts(self, sizes: dict[str, int]) -> dict[str, int]:
        """Name → address; `scratch_values` is a number and stays."""
        whole = sum(-(-size // LINE) * LINE for name, size in sizes.items()) + LINE
        if len(self._memory) < whole:
            self._memory = torch.empty(whole + whole // 4, dtype=torch.uint8)
        address = self._memory.data_ptr()
        address += -address % LINE
        found = {"scratch_values": sizes["scratch_values"]}
        for name, size in sizes.items():
            if name != "scratch_values":
                found[name] = address
                address += -(-size // LINE) * LINE
        return found
