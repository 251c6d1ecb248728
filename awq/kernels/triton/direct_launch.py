"""Starting the kernels of `direct`, and for which products they are the better ones."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from awq.formats.planar import padded
from awq.kernels.packed import Packed, Shape
from awq.kernels.triton.configs import GATE_INTERLEAVE
from awq.kernels.triton.launcher import Launcher, architecture, has_dependent_launch, on_device

BLOCK = 128  # inputs of a block of the planar layout
MOST_BLOCKS = 32  # of inputs that a program of eight warps holds: more do not fit the registers
MOST_WEIGHTS = 5120 * 2048  # of a linear: the largest that was measured
# programs for each multiprocessor, so that all of them run at once: of two warps, of four
MOST_SMALL, MOST_MEDIUM = 6, 4
_OLDEST_RELEASE = (3, 6)  # of Triton, whose Gluon the kernels are written in


class Direct(NamedTuple):
    """bn: rows of the weight that a program holds. warps: of a program. registers: of a thread at
    most, 0 for as many as it takes."""

    bn: int
    warps: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """Of the kernel's compilation."""
        most = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, **most}


@cache
def kernels() -> Any:
    """The module of kernels; None with a Triton that does not bring this Gluon."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < _OLDEST_RELEASE:
        return None
    try:
        from awq.kernels.triton import direct
    except ImportError:  # Gluon is experimental: a later one may be another
        return None
    return direct


def fits(shape: Shape) -> bool:
    """Whether all inputs of a tile can be the batch of one product: a scale for each block."""
    return shape.group_size % BLOCK == 0 or shape.group_size >= shape.in_features


def _measured(index: int | None, shape: Shape, tokens: int) -> bool:
    name, _ = architecture(index)
    return name == "sm90" and tokens == 1 and fits(shape) and kernels() is not None


@cache
def form_for(index: int | None, shape: Shape, tokens: int) -> Direct | None:
    """How the product of one token is held; None where the kernels that load in steps are better,
    or where nothing was measured."""
    blocks = _blocks(shape.in_features)
    few = shape.in_features * shape.out_features <= MOST_WEIGHTS
    if not few or blocks > MOST_BLOCKS or not _measured(index, shape, tokens):
        return None

    return Direct(16, 4 if blocks <= 16 else 8)


@cache
def expert_form_for(
    index: int | None, shape: Shape, tokens: int, top: int, first: bool, dtype: torch.dtype
) -> Direct | None:
    """`form_for` for the first or the second product of `top` experts."""
    blocks = _blocks(shape.in_features)
    if blocks > MOST_BLOCKS // 2 or not _measured(index, shape, tokens):
        return None

    # planes of bfloat16 take more registers at a time
    small = Direct(16, 2, 168) if dtype == torch.float16 else Direct(16, 4)
    form = small if first else Direct(32, 2 if blocks <= 8 else 4)
    programs = top * -(-shape.out_features // form.bn)
    _, processors = architecture(index)
    return form if programs <= (MOST_SMALL if first else MOST_MEDIUM) * processors else None


@cache
def sum_form_for(index: int | None, shape: Shape, tokens: int, top: int) -> Direct | None:
    """`form_for` for the second product of `top` experts and their sum in one kernel."""
    blocks = _blocks(top * shape.in_features)
    if shape.in_features % BLOCK or blocks > 2 * MOST_BLOCKS:
        return None
    if not _measured(index, shape, tokens):
        return None

    form = Direct(16, 8)
    programs = -(-shape.out_features // form.bn)
    _, processors = architecture(index)
    return form if programs <= processors else None


def _result(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Where a kernel writes. Weights are read before the wait for what ran before, which may just
    have written them. In a captured step it has not; else an ordinary kernel comes in between."""
    if x.is_cuda and not torch.cuda.is_current_stream_capturing():
        return x.new_zeros(shape)
    return x.new_empty(shape)


def _blocks(inputs: int, warps: int = 1) -> int:
    """Blocks of inputs of a kernel, a power of two; at least one for every warp."""
    return max(warps, triton.next_power_of_2(-(-inputs // BLOCK)))


def product(
    x: Tensor, packed: Packed, bias: Tensor | None, form: Direct, gated: str = ""
) -> Tensor:
    """As `matmul_launch.fused`, for x of one row."""
    shape, device = packed.shape, x.device
    x = x.contiguous()
    y = _result(x, (1, shape.out_features // (2 if gated else 1)))
    kernel = _product(
        device.index, x.dtype, shape, form, None if bias is None else bias.dtype, gated
    )

    with on_device(device):
        tensors = (x, packed.qweight, packed.scales, y if bias is None else bias, y)
        kernel((-(-shape.out_features // form.bn), 1, 1), tensors)

    return y


def expert_product(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor | None,
    form: Direct,
    gated: str = "",
    alternating: bool = False,
    chosen_before: bool = False,
) -> Tensor:
    """As `expert_launch.fused`, for experts [1, top_k] of one token."""
    shape, device = packed.shape, x.device
    _, top = experts.shape
    x, experts = x.contiguous(), experts.contiguous()
    y = _result(x, (1, top, shape.out_features // (2 if gated else 1)))
    bias, weights = (None if t is None else t.contiguous() for t in (bias, weights))
    dtypes = tuple(None if t is None else t.dtype for t in (x, bias, weights, experts))
    sharing = top if x.dim() == 2 else 1
    kernel = _experts(
        device.index,
        dtypes,
        shape,
        packed.qweight.shape[2],
        sharing,
        form,
        gated,
        alternating,
        chosen_before,
    )

    with on_device(device):
        tensors = (
            x,
            packed.qweight,
            packed.scales,
            y if bias is None else bias,
            y if weights is None else weights,
            experts,
            y,
        )
        grid = (top, -(-shape.out_features // form.bn), 1)
        kernel(grid, tensors, top, packed.qweight.shape[0])

    return y


def expert_sum(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    form: Direct,
    chosen_before: bool = False,
) -> Tensor:
    """The weighted outputs of one token's experts [1, top_k], added up: [1, 1, out]. x [1, top_k,
    in]."""
    shape, device = packed.shape, x.device
    _, top = experts.shape
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    y = _result(x, (1, 1, shape.out_features))
    bias = None if bias is None else bias.contiguous()
    dtypes = tuple(None if t is None else t.dtype for t in (x, bias, weights, experts))
    kernel = _sums(device.index, dtypes, shape, packed.qweight.shape[2], top, form, chosen_before)

    with on_device(device):
        tensors = (
            x,
            packed.qweight,
            packed.scales,
            y if bias is None else bias,
            weights,
            experts,
            y,
        )
        kernel((-(-shape.out_features // form.bn), 1, 1), tensors, packed.qweight.shape[0])

    return y


def _sizes(shape: Shape, padded_rows: int, form: Direct) -> tuple[int, ...]:
    """N, K, GROUP, NP, TP, BN."""
    return (
        shape.out_features,
        shape.in_features,
        shape.group_size,
        padded_rows,
        _blocks(shape.in_features, form.warps),
        form.bn,
    )


@cache
def _product(
    index: int | None,
    dtype: torch.dtype,
    shape: Shape,
    form: Direct,
    bias: torch.dtype | None,
    gated: str,
) -> Launcher:
    constants = (
        *_sizes(shape, padded(*shape[:2])[1], form),
        bias is not None,
        gated,
        GATE_INTERLEAVE,
        form.warps,
        has_dependent_launch(index),
    )
    return Launcher(kernels().direct_kernel, index, constants, **form.options())


@cache
def _experts(
    index: int | None,
    dtypes: tuple[torch.dtype | None, ...],
    shape: Shape,
    padded_rows: int,
    sharing: int,
    form: Direct,
    gated: str,
    alternating: bool,
    chosen_before: bool,
) -> Launcher:
    _, bias, weights, _ = dtypes
    n, k, group, rows, blocks, bn = _sizes(shape, padded_rows, form)
    constants = (
        sharing,
        n,
        k,
        group,
        -(-k // group),
        rows,
        blocks,
        bn,
        bias is not None,
        weights is not None,
        gated,
        1 if alternating else 0,
        chosen_before,
        form.warps,
        has_dependent_launch(index),
    )
    return Launcher(kernels().direct_expert_kernel, index, constants, **form.options())


@cache
def _sums(
    index: int | None,
    dtypes: tuple[torch.dtype | None, ...],
    shape: Shape,
    padded_rows: int,
    top: int,
    form: Direct,
    chosen_before: bool,
) -> Launcher:
    _, bias, _, _ = dtypes
    n, k, group, rows, _, bn = _sizes(shape, padded_rows, form)
    constants = (
        top,
        n,
        k,
        group,
        -(-k // group),
        rows,
        _blocks(top * k, form.warps),
        bn,
        bias is not None,
        chosen_before,
        form.warps,
        has_dependent_launch(index),
    )
    return Launcher(kernels().direct_expert_sum_kernel, index, constants, **form.options())
