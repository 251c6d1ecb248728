"""Builds the image of an encoder's program from what `structure` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from awq.embed.attention import AttentionPlan
from awq.embed.observe import NotReadable
from awq.embed.structure import EncoderPlan
from awq.kernels.cpu import engine
from awq.kernels.cpu.encoder.layout import JOB, LAYER, NO_WINDOW
from awq.kernels.cpu.encoder.program import emit_encoder
from awq.kernels.cpu.task import Array
from awq.kernels.specs import Norm
from awq.native import matrix_unit, store
from awq.native.image import LINE, NOWHERE, Image, large_pages
from awq.native.machine import host_name
from awq.native.sources import sources
from awq.native.spec import EncoderSpec
from awq.nn.linear import WQLinear

PLANES = {"float32": 3, "exact": 2, "int8": 1}  # bytes of an activation
MAX_GROUP = 256  # inputs whose integer sums fit 32 bits


def build_image(plan: EncoderPlan, pooling: str, normalize: bool, precision: str) -> Image:
    """pooling: mean, cls or lasttoken; normalize: to norm 1 after it. The plan's table of words is
    shared, everything else is copied.

    Raises NotReadable for what the program cannot compute, ImportError without llvmlite.
    """
    spec = _spec(plan, pooling, normalize, PLANES[precision])
    words = plan.words.detach().contiguous()
    weights = _Weights(plan, spec)

    return Image(
        spec=spec,
        job=tuple(JOB.fields),
        fields=weights.fields,
        layers=weights.layers,
        is_address=np.array([isinstance(kind, Array) for kind in LAYER.fields.values()]),
        memory=weights.memory,
        words=words.view(torch.uint8).flatten().numpy(),
        code=_code(words.dtype, spec),
        vocabulary=len(words),
        longest=plan.longest,
        position_offset=plan.position_offset,
        max_distance=0 if plan.relative is None else (plan.relative.shape[1] + 1) // 2,
    )


@cache
def _code(dtype: torch.dtype, spec: EncoderSpec) -> bytes:
    """The program's object file, from the store if another process made it."""
    target = engine.host_target()
    if target is None:
        raise NotReadable("the CPU has no AVX2, AVX-512 or Arm dot products")

    settings = f"{dtype}{spec}{target}{host_name()}{sources()}"
    name = hashlib.sha256(settings.encode()).hexdigest() + ".o"
    kept = store.load(name)
    if kept is not None:
        return bytes(kept)

    code = engine.object_code(emit_encoder, dtype, target, spec)
    store.save(name, code)

    return code


def _spec(plan: EncoderPlan, pooling: str, normalize: bool, planes: int) -> EncoderSpec:
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

    maybe = [plan.norm, plan.final_norm]
    for b in plan.blocks:
        maybe += [b.attention_norm, b.mlp_norm, *(b.post_norms or ())]
    norms = [norm for norm in maybe if norm is not None]
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
        matrix_unit=matrix_unit.is_usable(),
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


class _Memory:
    """Tensors that will lie in one piece of memory, each on a cache line of its own."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._offsets: dict[int, int] = {}  # by the identity of tensors, which `_parts` keeps
        self._size = 0

    def add(self, tensor: Tensor | None) -> int:
        """Its offset. The same tensor lies there once."""
        if tensor is None:
            return NOWHERE

        if id(tensor) not in self._offsets:
            self._offsets[id(tensor)] = self._size
            self._parts.append(tensor)
            size = tensor.numel() * tensor.element_size()
            self._size += -(-size // LINE) * LINE
        return self._offsets[id(tensor)]

    def settle(self) -> np.ndarray:
        memory = large_pages(self._size)
        for tensor in self._parts:
            start = self._offsets[id(tensor)]
            data = tensor.detach().contiguous().view(torch.uint8).flatten().numpy()
            memory[start : start + len(data)] = data
        return memory


class _Weights:
    """Where all weights lie, in the order in which the program reads them."""

    def __init__(self, plan: EncoderPlan, spec: EncoderSpec) -> None:
        self._memory = _Memory()
        self.fields: dict[str, int] = {
            "position_table": self._memory.add(plan.positions),
            "type_table": self._memory.add(plan.types),
        }
        first = plan.blocks[0].attention_norm if spec.pre_norm else None
        self._norm(self.fields, "norm", plan.norm)
        self._norm(self.fields, "first_norm", first)
        self.fields = {name: place for name, place in self.fields.items() if place != NOWHERE}

        rows = []
        for i in range(len(plan.blocks)):
            layer = self._layer(plan, spec, i)
            rows.append([layer[name] for name in LAYER.fields])

        self.layers = np.array(rows, np.int64)
        self.memory = self._memory.settle()

    def _layer(self, plan: EncoderPlan, spec: EncoderSpec, i: int) -> dict[str, int]:
        block = plan.blocks[i]
        is_last = i + 1 == len(plan.blocks)
        fields: dict[str, int] = {}
        self._linear(fields, "qkv", block.attention.qkv)
        self._linear(fields, "o", (block.o,))
        self._linear(fields, "up", block.up)
        self._linear(fields, "down", (block.down,))
        after_attention: Norm | None = block.attention_norm
        after_mlp: Norm | None = block.mlp_norm

        if spec.pre_norm:
            after_attention = block.mlp_norm
            after_mlp = plan.final_norm if is_last else plan.blocks[i + 1].attention_norm

        self._norm(fields, "norm1", after_attention)
        self._norm(fields, "norm2", after_mlp)
        for name, post in zip(("post1", "post2"), block.post_norms or (None, None)):
            self._norm(fields, name, post)

        relative = self._memory.add(plan.relative)
        return (
            fields
            | self._attention(block.attention)
            | dict(relative=relative, keep_norm2=int(is_last))
        )

    def _attention(self, attention: AttentionPlan) -> dict[str, int]:
        cos, sin = attention.rotary or (None, None)
        q_norm = attention.q_norm
        k_norm = attention.k_norm
        add = self._memory.add

        return dict(
            cos=add(cos),
            sin=add(sin),
            q_norm=add(None if q_norm is None else q_norm.weight),
            k_norm=add(None if k_norm is None else k_norm.weight),
            window=NO_WINDOW if attention.window is None else attention.window,
        )

    def _norm(self, fields: dict[str, int], name: str, norm: Norm | None) -> None:
        fields[f"{name}_weight"] = self._memory.add(None if norm is None else norm.weight)
        fields[f"{name}_bias"] = self._memory.add(None if norm is None else norm.bias)

    def _linear(self, fields: dict[str, int], name: str, linears: Sequence[WQLinear]) -> None:
        packed = [linear.packed.to_layout("rows16") for linear in linears]
        if any(p.shape.out_features % 16 for p in packed):
            which = "a joined linear" if len(packed) > 1 else "a linear"
            raise NotReadable(f"{which} has outputs that are no multiple of 16")

        for field, part in (("codes", "qweight"), ("scales", "scales"), ("zeros", "qzeros")):
            joined = torch.cat([getattr(p, part).view(torch.uint8).flatten() for p in packed])
            fields[f"{name}_{field}"] = self._memory.add(joined)

        biases = []
        for linear in linears:
            if linear.bias is None:
                biases.append(torch.zeros(linear.out_features, dtype=torch.float32))
            else:
                biases.append(linear.bias.float())

        fields[f"{name}_bias"] = self._memory.add(torch.cat(biases))
