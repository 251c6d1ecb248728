"""Runs the kernels of a decode step against plain operators and prints relative errors as JSON.

Without arguments in Triton's interpreter (TRITON_INTERPRET=1, set by the caller), in float32;
`python tests/decoding_cases.py cuda` on a GPU, in float16 and bfloat16 too. A script, because
Triton decides at the import of a kernel whether it is interpreted.
"""

import json
import sys
from dataclasses import replace

import torch

from awq.backends import operator
from awq.generate.run import operations as ops
from awq.generate.run.cache import LayerCache
from awq.generate.run.greedy import Greedy
from awq.kernels.reference import mixture
from awq.kernels.reference.attention import attend
from awq.kernels.reference.decode import ACTIVATIONS, apply_norm, choose_token
from awq.kernels.specs import Attention, Norm, Router
from awq.kernels.triton import decode_launch, routing_launch

# heads, kv_heads, head_dim, rotary channels, window, softcap, norm of heads, cached tokens of each
# row
PLAIN = Attention(4, 2, 32, 32**-0.5, None, None, 32)
ATTENTIONS = {
    "first token": (PLAIN, [0]),
    "one program": (PLAIN, [5]),
    "several programs": (PLAIN, [517]),
    "very many": (PLAIN, [1100]),
    "rows of different lengths": (PLAIN, [3, 250, 64, 63]),
    "one head each": (replace(PLAIN, heads=3, kv_heads=3), [130, 2]),
    "many heads share": (replace(PLAIN, heads=40, kv_heads=2), [300]),
    "partial rotation, odd size": (replace(PLAIN, head_dim=40, rotary=16), [100, 7]),
    "no rotation": (replace(PLAIN, rotary=0), [70]),
    "window": (replace(PLAIN, window=100), [40, 99, 100, 400]),
    "softcap": (replace(PLAIN, softcap=5.0, scaling=1.0), [80]),
    "normed heads": (
        replace(PLAIN, q_norm=Norm(None, None, 1e-6, False), k_norm=Norm(None, None, 1e-5, False)),
        [66, 1],
    ),
    "large heads": (replace(PLAIN, head_dim=256, rotary=256, heads=8, kv_heads=1), [150]),
}


def attention_error(a: Attention, lengths: list[int], dtype: torch.dtype, device: str) -> float:
    torch.manual_seed(len(lengths) + lengths[0])
    batch, places = len(lengths), max(lengths) + 3
    if a.q_norm is not None and a.k_norm is not None:
        norms = (
            replace(n, weight=1 + 0.2 * torch.randn(a.head_dim, device=device))
            for n in (a.q_norm, a.k_norm)
        )
        a = replace(a, **dict(zip(("q_norm", "k_norm"), norms)))
    qkv = torch.randn(batch, 1, (a.heads + 2 * a.kv_heads) * a.head_dim, device=device, dtype=dtype)
    caches = [
        torch.randn(batch, a.kv_heads, places, a.head_dim, device=device, dtype=dtype)
        for _ in range(2)
    ]
    angles = torch.arange(places).unsqueeze(1) / 100 ** (
        torch.arange(a.rotary // 2) / max(1, a.rotary)
    )
    cos, sin = (angles.cos().to(device), angles.sin().to(device)) if a.rotary else (None, None)
    position = torch.tensor(lengths, dtype=torch.int32, device=device)
    ours = LayerCache(*(t.clone() for t in caches))
    y, again = (ops.attend_step(qkv, a, cos, sin, ours, position, max(lengths)) for _ in range(2))
    assert torch.equal(y, again), "two runs differ"
    worst = 0.0
    for row, length in enumerate(lengths):  # the same, one row at a time, in float64
        turn = (
            (cos[length].double(), sin[length].double())
            if cos is not None and sin is not None
            else (None, None)
        )
        q, k, v = ops.split_heads(
            qkv[row : row + 1].double() if a.q_norm is None else qkv[row : row + 1].float(),
            a,
            *turn,
        )
        k, v = (
            torch.cat([c[row : row + 1, :, :length].to(t.dtype), t], 2)
            for c, t in zip(caches, (k, v))
        )
        expected = attend(q, k, v, a.scaling, a.softcap, a.window).flatten().double()
        worst = max(worst, float((y[row].flatten().double() - expected).norm() / expected.norm()))
        for ours_, new in ((ours.k, k), (ours.v, v)):
            worst = max(
                worst,
                float(
                    (ours_[row, :, length].double() - new[0, :, -1]).norm()
                    / new[0, :, -1].double().norm()
                ),
            )
            assert torch.equal(
                ours_[row, :, length + 1 :],
                (caches[0] if ours_ is ours.k else caches[1])[row, :, length + 1 :],
            )
    return worst


def prompt_error(a: Attention, tokens: int, start: int, dtype: torch.dtype, device: str) -> float:
    """Queries, and what goes into the cache, against plain operators."""
    torch.manual_seed(tokens)
    if a.q_norm is not None and a.k_norm is not None:
        norms = (
            replace(n, weight=1 + 0.2 * torch.randn(a.head_dim, device=device))
            for n in (a.q_norm, a.k_norm)
        )
        a = replace(a, **dict(zip(("q_norm", "k_norm"), norms)))
    qkv = torch.randn(
        3, tokens, (a.heads + 2 * a.kv_heads) * a.head_dim, device=device, dtype=dtype
    )
    places = start + tokens + 5
    cache = LayerCache(
        *(
            torch.zeros(3, a.kv_heads, places, a.head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )
    )
    angles = torch.arange(places).unsqueeze(1) / 100 ** (
        torch.arange(a.rotary // 2) / max(1, a.rotary)
    )
    cos, sin = (angles.cos().to(device), angles.sin().to(device)) if a.rotary else (None, None)
    q = ops.cache_prompt(qkv, a, cos, sin, cache, start)
    turn = [None if t is None else t[start : start + tokens] for t in (cos, sin)]
    expected = ops.split_heads(qkv.float(), a, *turn)
    found = (q, cache.k[:, :, start : start + tokens], cache.v[:, :, start : start + tokens])
    assert not cache.k[:, :, :start].any() and not cache.k[:, :, start + tokens :].any()
    return max(float((x.float() - y).norm() / y.norm()) for x, y in zip(found, expected))


def norm_error(width: int, mean: bool, bias: bool, dtype: torch.dtype, device: str) -> float:
    torch.manual_seed(width)
    x, branch = (torch.randn(2, 3, width, device=device, dtype=dtype) for _ in range(2))
    norm = Norm(
        torch.randn(width, device=device),
        torch.randn(width, device=device) if bias else None,
        1e-5,
        mean,
    )
    total, y = ops.add_norm(x, branch, 0.5, norm)
    expected = x.double() + 0.5 * branch.double()
    normed = apply_norm(total.float(), norm).double()
    return max(
        float((a.double() - b).norm() / b.norm()) for a, b in ((total, expected), (y, normed))
    )


def activation_error(name: str, gated: bool, dtype: torch.dtype, device: str) -> float:
    torch.manual_seed(0)
    h = 3 * torch.randn(2, 1, 2 * 700, device=device, dtype=dtype)
    y = ops.activate(h, ACTIVATIONS[name], name, gated).double()
    gate, up = h.double().chunk(2, -1)
    expected = ACTIVATIONS[name](gate) * up if gated else ACTIVATIONS[name](h.double())
    return float((y - expected).norm() / expected.norm())


# rows, width, experts, top_k, parts of the branch, weights of a program, settings of the router
ROUTERS = {
    "one program": (1, 256, 8, 2, 1, 1 << 16, {}),
    "several programs, sum of parts": (3, 100, 16, 4, 3, 256, {"normalized": False}),
    "corrected sigmoid": (2, 100, 60, 6, 0, 512, {"sigmoid": True, "factor": 2.5}),
    "many rows": (40, 64, 128, 8, 8, 512, {}),
    "best groups": (3, 64, 32, 4, 1, 512, {"groups": 8, "kept": 3, "normalized": False}),
    "groups of an odd size, two best": (
        2,
        64,
        36,
        4,
        0,
        1 << 16,
        {"groups": 6, "kept": 2, "group_best": 2, "sigmoid": True},
    ),
}


def router_error(case: tuple, biased: bool, dtype: torch.dtype, device: str) -> float:
    """Sum, norm, choice and weights against plain operators, which are given the same sums."""
    rows, width, experts, top, parts, held, settings = case
    torch.manual_seed(rows + experts)
    x = torch.randn(rows, 1, width, device=device, dtype=dtype)
    branch = torch.randn(rows, 1, parts, width, device=device, dtype=dtype) if parts else None
    norm = Norm(torch.rand(width, device=device) + 0.5, None, 1e-6, False)
    vectors = {
        name: torch.randn(experts, device=device) / 4 if biased else None
        for name in ("bias", "correction")
    }
    weight = torch.randn(experts, width, device=device).to(dtype) / width**0.5
    router = Router(weight.contiguous(), top, **settings, **vectors)
    kept, routing_launch.SHARE = routing_launch.SHARE, held
    try:
        found = [ops.add_norm_route(x, branch, 0.5, norm, router) for _ in range(2)]
    finally:
        routing_launch.SHARE = kept
    assert all(torch.equal(a, b) for a, b in zip(*found)), "two runs differ"
    total, y, index, weights = found[0]
    added = 0 if branch is None else 0.5 * branch.double().sum(2)
    expected_index, expected_weights = mixture.route(y.view(rows, width), router)
    assert torch.equal(index, expected_index)
    pairs = [
        (total, x.double() + added),
        (y, apply_norm(total.float(), norm).double()),
        (weights, expected_weights.double()),
    ]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def choice_error(batch: int, vocabulary: int, device: str) -> float:
    """Choices that differ from plain operators', of ties, zeros of both signs and what is no
    number; the second of two calls, of which the first ends a row."""
    torch.manual_seed(batch)
    drawn = torch.randn(batch, vocabulary)
    zeros = torch.full_like(drawn, -0.0)
    zeros[:, 3] = 0.0
    broken = drawn.clone()
    broken[0, 7], broken[-1, 5], broken[-1, 9] = torch.nan, torch.inf, torch.nan
    wrong = 0.0
    for logits in (drawn, drawn.round(), zeros, broken):
        states = []
        for choose in (decode_launch.choose_token, choose_token):
            state = Greedy(batch, torch.device(device))
            state.ends[3] = int(logits[0].argmax())
            state.padding.fill_(9)
            vectors = (state.ids, state.going, state.found, state.ends, state.padding)
            for _ in range(2):
                choose(logits.to(device), *vectors, state.scratch)
            states.append((state.ids, state.going, state.found, state.scratch))
        wrong += sum(not torch.equal(*pair) for pair in zip(*states))
    return wrong


def main(device: str) -> dict[str, float]:
    errors = {}
    for dtype in (
        (torch.float32,) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
    ):
        kind = str(dtype).removeprefix("torch.")
        assert (
            operator("attend", torch.device(device), dtype).__module__
            == "awq.kernels.triton.decode_launch"
        )
        for name, (a, lengths) in ATTENTIONS.items():
            errors[f"attention, {name}, {kind}"] = attention_error(a, lengths, dtype, device)
            errors[f"prompt, {name}, {kind}"] = prompt_error(a, 7, 3 * len(lengths), dtype, device)
        for width, mean, bias in ((64, False, False), (100, True, True), (2048, False, True)):
            errors[f"norm {width} {mean} {bias}, {kind}"] = norm_error(
                width, mean, bias, dtype, device
            )
        if dtype == torch.float32:
            for batch, vocabulary in ((1, 5000), (3, 2049), (9, 70)):
                errors[f"choice, {batch}"] = choice_error(batch, vocabulary, device)
        for name, case in ROUTERS.items():
            errors[f"router, {name}, {kind}"] = max(
                router_error(case, biased, dtype, device) for biased in (False, True)
            )
        for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
            errors[f"{name}, {kind}"] = max(
                activation_error(name, gated, dtype, device) for gated in (True, False)
            )
    return errors


if __name__ == "__main__":
    place = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if place == "cpu":
        import interpreter  # noqa: F401
    json.dump(main(place), sys.stdout, indent=1)
