"""Packed weights that nothing reads, refused behind transformers' own doors.

transformers loads a checkpoint whose `quant_method` it does not know, or whose config names none,
as an ordinary one: its packed weights are left over, a warning says so, and random numbers stand in
their place. `refuse_unread` looks at the report of such a load.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

from awq.config import METHOD
from awq.errors import CheckpointError

_LOAD = "_load_pretrained_model"  # fills a model that was built: the same name in 4.51 and in 5.24


def refuse_unread(modeling: Any) -> None:
    """Makes `PreTrainedModel` of transformers' `modeling_utils` refuse them; again is harmless."""
    kind = modeling.PreTrainedModel
    own = inspect.getattr_static(kind, _LOAD, None)
    load = getattr(own, "__func__", None)
    if load is None or hasattr(load, "before_awq"):
        return

    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        settings = given.get("load_config")  # of 5.x, which keeps the quantizer there
        quantizer = getattr(settings, "hf_quantizer", None) or given.get("hf_quantizer")
        if quantizer is None:
            _check(given["model"].config, _left_over(result))

        return result

    checked.before_awq = own  # type: ignore[attr-defined]
    setattr(kind, _LOAD, type(own)(checked))


def allow_unread(modeling: Any) -> None:
    """Undoes `refuse_unread`."""
    kind = modeling.PreTrainedModel
    checked = getattr(inspect.getattr_static(kind, _LOAD, None), "__func__", None)
    own = getattr(checked, "before_awq", None)
    if own is not None:
        setattr(kind, _LOAD, own)


def _left_over(result: Any) -> Iterable[str]:
    """Names of tensors without a place. 5.x reports them in an object; 4.x returns (model, missing,
    unexpected, …)."""
    for part in result if isinstance(result, tuple) else (result,):
        if hasattr(part, "unexpected_keys"):
            return part.unexpected_keys
    return result[2]


def _check(config: Any, left_over: Iterable[str]) -> None:
    packed = sorted(name for name in left_over if name.endswith(".qweight"))
    if not packed:
        return

    name = getattr(config, "_name_or_path", "") or "the checkpoint"
    stored = getattr(config, "quantization_config", None)
    get = stored.get if isinstance(stored, dict) else functools.partial(getattr, stored)
    method = get("quant_method", None) if stored else None

    if stored:
        why = f"names the quant_method {method!r}, which transformers does not know"
    else:
        why = "has no quantization_config"

    raise CheckpointError(
        f"{name} holds packed weights (first: {packed[0]}), but its config.json {why}; "
        f"quant_method {METHOD!r} reads AWQ's."
    )
