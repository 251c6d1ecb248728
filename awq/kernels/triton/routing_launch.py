"""Starting the kernels of `routing`: what the functions of these names in
`awq.kernels.reference.mixture` say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from awq.kernels.specs import Norm, Router
from awq.kernels.triton import routing
from awq.kernels.triton.decode_launch import add_norm, launcher_of, parts_of
from awq.kernels.triton.launcher import Launcher, counters, on_device

FEW_ROWS = 16  # for more, the router's weights are better read by an ordinary product
SHARE = 1 << 13  # weights of a router that one program holds


def route(x: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Chosen experts and their weights of rows x [tokens, features]."""
    if 0 < len(x) <= FEW_ROWS:
        _, _, index, weights = add_norm_route(x, None, 1.0, None, router)

        return index, weights

    logits = F.linear(x.float(), router.weight.float(), router.bias)
    index, weights = _results(len(x), router, x.device)
    if len(x) == 0:
        return index, weights

    experts = router.experts
    constants = (
        experts,
        triton.next_power_of_2(experts),
        router.top_k,
        router.sigmoid,
        router.normalized,
        router.correction is not None,
        router.groups,
        router.kept,
        router.group_best,
    )
    kernel = launcher_of(routing.choose_kernel, x.device.index, (), constants, 4)
    correction = logits if router.correction is None else router.correction

    with on_device(x.device):
        kernel((len(x), 1, 1), (logits, correction, index, weights), router.factor)

    return index, weights


def add_norm_route(
    x: Tensor, branch: Tensor | None, factor: float, norm: Norm | None, router: Router
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual sum, norm and route, in one kernel where rows are few."""
    width = x.shape[-1]
    rows = x.numel() // width
    if not 0 < rows <= FEW_ROWS:
        total, y = add_norm(x, branch, factor, norm)
        return total, y, *route(y.view(-1, width), router)

    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    y = total if norm is None else torch.empty_like(x)
    index, weights = _results(rows, router, x.device)
    kernel, share = _add_norm_route(x, parts_of(x, branch), norm, router)
    programs = -(-router.experts // share)
    norm_weight, norm_bias, eps = (
        (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    )
    second = x if branch is None else branch.contiguous()
    vectors = tuple(
        x if t is None else t
        for t in (norm_weight, norm_bias, router.weight, router.bias, router.correction)
    )
    logits = arrived = index

    with on_device(x.device):
        if programs > 1:
            logits = weights.new_empty((rows, router.experts))
            arrived = counters(x.device).take(rows)
        results = (total, y, logits, index, weights, arrived)
        kernel((programs, rows, 1), (x, second, *vectors, *results), factor, eps, router.factor)

    return total, y, index, weights


def _results(rows: int, router: Router, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (rows, router.top_k)
    return (
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def _add_norm_route(
    x: Tensor, parts: int, norm: Norm | None, router: Router
) -> tuple[Launcher, int]:
    """(kernel, experts of one of its programs)."""
    width = x.shape[-1]
    block, experts = triton.next_power_of_2(width), triton.next_power_of_2(router.experts)
    share = max(1, min(experts, SHARE // block))
    constants = (
        width,
        block,
        parts,
        norm is not None,
        norm is not None and norm.centered,
        norm is not None and norm.weight is not None,
        norm is not None and norm.bias is not None,
        router.experts,
        experts,
        share,
        router.top_k,
        router.sigmoid,
        router.normalized,
        router.bias is not None,
        router.correction is not None,
        router.groups,
        router.kept,
        router.group_best,
    )
    warps = min(16, max(4, share * block // 2048))
    dtypes = (x.dtype, router.weight.dtype)
    kernel = launcher_of(routing.add_norm_route_kernel, x.device.index, dtypes, constants, warps)

    return kernel, share
