"""Causal attention in plain operators: of a prompt (or a piece of it) over itself and what is
cached before it, and of one new token per sequence. What the kernels are tested against, and what
runs without a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[batch, heads, tokens, value_dim] for q [batch, heads, tokens, head_dim] and k [batch,
    kv_heads, keys, head_dim], v [batch, kv_heads, keys, value_dim] (keys ≥ tokens).

    The last query sees the last key, the one before it the last but one, and so on, at most
    `window` keys each. mask (bool, True where seen, broadcast to [batch, 1, tokens, keys]) replaces
    that rule. sinks [heads]: the score of a key whose value is 0 and which every token sees.
    """
    tokens = q.shape[2]
    keys = k.shape[2]
    plain = mask is None and (window is None or keys <= window)
    if mask is None and not (plain and (tokens == keys or tokens == 1)):
        mask = causal_mask(tokens, keys, window, q.device)
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and tokens > 1,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    if mask is None:
        mask = causal_mask(tokens, keys, window, q.device)
    batch, heads, _, dim = q.shape
    q = q.view(batch, k.shape[1], -1, tokens, dim)
    scores = torch.einsum("bkgtd,bksd->bkgts", q.float(), k.float()) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, k.shape[1], -1, 1, 1).expand(batch, -1, -1, tokens, 1)
        scores = torch.cat([scores, column], -1)

    weights = scores.softmax(-1)[..., :keys]
    return (
        torch.einsum("bkgts,bksd->bkgtd", weights, v.float())
        .reshape(batch, heads, tokens, v.shape[-1])
        .to(q.dtype)
    )


def causal_mask(tokens: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [tokens, keys]: which keys the last `tokens` positions see."""
    query = torch.arange(keys - tokens, keys, device=device).unsqueeze(-1)
    key = torch.arange(keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first 2·r channels, as two halves; the others
    pass.

    x [..., head_dim]; cos, sin float32 [..., r], broadcast against x.
    """
    r = cos.shape[-1]
    a = x[..., :r].float()
    b = x[..., r : 2 * r].float()
    parts = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * r :]]
    return torch.cat(parts, -1)
