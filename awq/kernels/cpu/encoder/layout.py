"""What a compiled encoder is given: the fields of a layer, and those of a call."""

from __future__ import annotations

from awq.kernels.cpu.ir_types import F16, F32, I8, I32, I64
from awq.kernels.cpu.task import COUNT, ELEMENT, Array, Task

LINEARS = ("qkv", "o", "up", "down")
NO_WINDOW = 1 << 30


def _linear_fields(name: str) -> dict[str, Array]:
    return {
        f"{name}_codes": Array(I8),
        f"{name}_scales": Array(F16),
        f"{name}_zeros": Array(I8),
        f"{name}_bias": Array(F32),
    }


# Weights of one layer. The norms are those that follow attention and MLP, wherever the model itself
# says that they belong.
LAYER = Task(
    **_linear_fields("qkv"),
    **_linear_fields("o"),
    **_linear_fields("up"),
    **_linear_fields("down"),
    norm1_weight=Array(F32),
    norm1_bias=Array(F32),
    norm2_weight=Array(F32),
    norm2_bias=Array(F32),
    post1_weight=Array(F32),
    post1_bias=Array(F32),
    post2_weight=Array(F32),
    post2_bias=Array(F32),
    q_norm=Array(F32),
    k_norm=Array(F32),
    cos=Array(F32),
    sin=Array(F32),
    relative=Array(F32),
    window=COUNT,
    keep_norm2=COUNT,
)
LAYER_FIELDS = len(LAYER.fields)

JOB = Task(
    counters=Array(I64),
    workers=COUNT,
    layers=Array(I64),
    tokens=COUNT,
    texts=COUNT,
    ids=Array(I32),
    positions=Array(I32),
    types=Array(I32),
    starts=Array(I32),
    words=Array(ELEMENT),
    position_table=Array(F32),
    type_table=Array(F32),
    norm_weight=Array(F32),
    norm_bias=Array(F32),
    first_norm_weight=Array(F32),
    first_norm_bias=Array(F32),
    hidden=Array(F32),
    planes=Array(I8),
    steps=Array(F32),
    sums=Array(F32),
    wide=Array(F32),
    branch=Array(F32),
    context=Array(F32),
    scratch=Array(F32),
    scratch_values=COUNT,
    max_distance=COUNT,
    prompt_tokens=COUNT,
    piece_tokens=COUNT,
    is_sliced=COUNT,
    out=Array(F32),
)
