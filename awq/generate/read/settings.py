"""What a block tells attention beside queries, keys and values."""

from __future__ import annotations

from typing import Any

from awq.generate.plan import NotFusable
from awq.generate.read.trace import AttentionCall

_READ_SETTINGS = {"scaling", "softcap", "sliding_window", "s_aux"}
# What attention may also be told in evaluation mode, with a mask and without a cache, and what then
# changes nothing.
_IDLE_SETTINGS = {
    "dropout",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


def settings_of(call: AttentionCall) -> dict[str, Any]:
    """scaling, softcap, window and sinks, as `Attention` takes them. Raises NotFusable when
    attention is told anything that is not known to change nothing."""
    told = call.settings
    others = [
        name
        for name, value in told.items()
        if value is not None and name not in _READ_SETTINGS | _IDLE_SETTINGS
    ]
    if others:
        raise NotFusable(f"attention takes {', '.join(sorted(others))}")
    return {
        "scaling": float(told["scaling"]),
        "softcap": told.get("softcap"),
        "window": told.get("sliding_window"),
        "sinks": None if told.get("s_aux") is None else told["s_aux"].detach().float(),
    }
