"""Our `HfQuantizer`: what makes `AutoModel.from_pretrained(quantized_dir)` work with this package alone.

Which linears are packed is read off the checkpoint itself: a linear is packed if the files hold its `qweight`. Lists of
modules in the config are a fallback only, since every tool spells and matches them differently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from awq.checkpoint.files import packed_names, weight_files
from awq.config import AwqConfig
from awq.errors import CheckpointError
from awq.nn.linear import WQLinear
from awq.nn.surgery import linear_shape, named_linears, replace_module

_previous: dict[str, Any] = {}


class AwqHfQuantizer(HfQuantizer):
    """Loads AWQ checkpoints into `WQLinear`. Keeps the dtype that was asked for; needs no compiled extension."""

    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert = list(getattr(quantization_config, "modules_to_not_convert", None) or [])

    @property
    def settings(self) -> AwqConfig:
        """The storage settings, from transformers' own config object."""
        source = self.quantization_config
        version = getattr(source, "version", None) or getattr(source, "format", None) or "gemm"
        return AwqConfig(
            source.bits, source.group_size, bool(source.zero_point), version, tuple(self.modules_to_not_convert)
        )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError for settings this package cannot read, before the model is built."""
        _ = self.settings

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """transformers 4.x: no dtype means float16, AutoAWQ's, on an accelerator and float32 on a CPU."""
        return torch_dtype or (torch.float16 if torch.cuda.is_available() else torch.float32)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        files = kwargs.get("checkpoint_files") or weight_files(getattr(model.config, "_name_or_path", ""))
        names = packed_names([Path(f) for f in files or [] if str(f).endswith(".safetensors")])
        replace_linears(model, self.settings, names)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, WQLinear):
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                dense.weight = nn.Parameter(module.dequantize(dtype or model.dtype))
                if module.bias is not None:
                    dense.bias = nn.Parameter(module.bias.to(dense.weight.dtype))
                replace_module(model, name, dense)
        return model


def replace_linears(model: nn.Module, config: AwqConfig, packed: set[str]) -> None:
    """Puts an empty `WQLinear` where the checkpoint has packed weights, in place.

    packed: names with a `qweight` in the files; when empty, every linear but the excluded ones and the output head is meant.
    Raises CheckpointError when the files hold packed weights but none of them belongs to this model.
    """
    base = getattr(model, "base_model_prefix", "")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    count = 0
    for name, module in named_linears(model).items():
        if packed:
            spellings = {name, f"{base}.{name}", name.removeprefix(f"{base}.")}
            chosen = not packed.isdisjoint(spellings)
        else:
            chosen = module is not head and not any(f".{p}." in f".{name}." for p in config.modules_to_not_convert)
        if chosen:
            in_features, out_features = linear_shape(module)
            size = config.group_size_of(in_features, name)
            place, dtype = module.weight.device, module.weight.dtype
            bias = getattr(module, "bias", None) is not None
            replace_module(model, name, WQLinear(in_features, out_features, bias, size, config.format, place, dtype))
            count += 1
    if not count:
        example = next(iter(sorted(packed)), "none")
        raise CheckpointError(
            f"none of the checkpoint's {len(packed)} quantized weights (first: {example}) belongs to {type(model).__name__}."
        )


def register() -> None:
    """Makes transformers load `quant_method: "awq"` through this package. `import awq` arranges it; calling again is harmless."""
    current = auto.AUTO_QUANTIZER_MAPPING.get("awq")
    if current is not AwqHfQuantizer:
        _previous["awq"] = getattr(current, "previous", current)
        auto.AUTO_QUANTIZER_MAPPING["awq"] = AwqHfQuantizer


def unregister() -> None:
    """Gives transformers its own AWQ loader back."""
    register()
    auto.AUTO_QUANTIZER_MAPPING["awq"] = _previous.pop("awq")
