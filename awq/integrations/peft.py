"""LoRA adapters of PEFT on packed linears: `get_peft_model(quantized_model, LoraConfig(...))` after
`import awq`.

PEFT builds an adapter around a linear by asking a list of dispatch functions, one for each kind of
quantized linear that it knows. Its function for AWQ asks for another package's classes, and
"all-linear" looks for `nn.Linear`; a `WQLinear` is neither. `register` puts our answer before
theirs, in the one module where PEFT looks the functions up, so every entry (`get_peft_model`,
`add_adapter`, `PeftModel.from_pretrained`, Trainer, TRL) finds it. PEFT's own AWQ layer does the
work: the packed linear, plus the adapter's product beside it. A fused model is no exception: each
of its slices gives way to the linear it stands for, and the fused blocks, which know of no adapter,
are not used any more.

`awq._register` imports this module when PEFT is imported, so that `import awq` imports no PEFT.
Tested with PEFT 0.18 and 0.21.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora.awq import AwqLoraLinear
from torch import nn

from awq.errors import ModelError
from awq.generate.run.projection import Slice
from awq.nn.linear import WQLinear

_MERGE = (
    "an adapter cannot be merged into 4-bit weights. Save it (save_pretrained), load the "
    "quantized model again, make it dense "
    "(model.dequantize()) and load the adapter there: PeftModel.from_pretrained(model, "
    "adapter).merge_and_unload()."
)


class PackedLoraLinear(AwqLoraLinear):
    """PEFT's adapter around a `WQLinear`: [..., in] to [..., out] in the activations' dtype."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises ModelError with the way that works."""
        raise ModelError(_MERGE)

    def unmerge(self) -> None:
        """Does nothing: nothing was ever merged."""


def register(lora_model: Any) -> None:
    """Teaches PEFT about `WQLinear`. lora_model: the module `peft.tuners.lora.model`; calling again
    is harmless."""
    if getattr(lora_model.dispatch_awq, "knows_packed_linears", False):
        return

    lora_model.dispatch_awq = _dispatcher(lora_model.dispatch_awq)
    tuners_utils._maybe_include_all_linear_layers = _with_packed(
        tuners_utils._maybe_include_all_linear_layers
    )


def _dispatcher(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def dispatch(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        get_base: Any = getattr(target, "get_base_layer", None)
        base = target if get_base is None else get_base()

        # of a fused model: the adapter gets a linear of its own
        if isinstance(base, Slice) and base is target:
            target = base = base.part()
        if isinstance(base, WQLinear):
            # PEFT does not know the class and says so, though it reads the sizes rightly
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Unsupported layer type")
                return PackedLoraLinear(target, adapter_name, *args, **kwargs)

        return theirs(target, adapter_name, *args, **kwargs)

    dispatch.knows_packed_linears = True  # type: ignore[attr-defined]
    return dispatch


def _with_packed(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Adds packed linears to what `target_modules="all-linear"` means."""

    @functools.wraps(theirs)
    def include(peft_config: Any, model: nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
        peft_config = theirs(peft_config, model)
        if everything:
            peft_config.target_modules = set(peft_config.target_modules) | _packed_names(model)
        return peft_config

    return include


def _packed_names(model: nn.Module) -> set[str]:
    """Names of packed linears, in a fused model those of the slices that stand for them."""
    slices = {name for name, module in model.named_modules() if isinstance(module, Slice)}
    packed = {name for name, module in model.named_modules() if isinstance(module, WQLinear)}
    return slices | {name for name in packed if name.rpartition(".")[0] not in slices}


register(sys.modules["peft.tuners.lora.model"])
