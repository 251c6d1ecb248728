"""Our `HfQuantizer`: what makes `AutoModel.from_pretrained(quantized_dir)` work with this package
alone.

Which linears are packed is read off the checkpoint itself: a linear is packed if the files hold its
`qweight`. Lists of modules in the config are a fallback only, since every tool spells and matches
them differently.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from torch import nn
from transformers import modeling_utils
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from awq import config as settings
from awq._unread import allow_unread, refuse_unread
from awq.checkpoint.account import (
    check_blocks,
    check_packed_numbers,
    check_parameter_shapes,
    check_stored_biases,
    check_stored_floats,
    parameter_shapes,
    place_activation_scales,
    settle_dtypes,
)
from awq.checkpoint.expert_names import names_in_files, sorted_in_files
from awq.checkpoint.files import (
    PackedTensors,
    check_packed,
    files_of,
    packed_among,
    tensor_headers,
)
from awq.checkpoint.glued import GluedLinears
from awq.checkpoint.loaded import check_loaded, restore_packed, stored_elsewhere, untie_packed
from awq.checkpoint.match import check_shapes, match_names
from awq.errors import CheckpointError
from awq.nn.expert_shape import holder_of, weight_names
from awq.nn.experts import named_experts
from awq.nn.expose import expose_experts
from awq.nn.layout import prepare
from awq.nn.linear import WQLinear
from awq.nn.memory import leave_files, trim
from awq.nn.packed_experts import AwqExperts, pack_experts
from awq.nn.sorted_products import conceal_sorted, expose_sorted
from awq.nn.surgery import linear_shape, named_linears, output_head, replace_module

logger = logging.getLogger("awq.checkpoint")

_TABLES: tuple[Any, ...] = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
_previous: list[Any] = []


def storage_settings(source: Any) -> settings.AwqConfig:
    """This package's settings from a transformers config object, or from the dict in `config.json`.

    Raises ConfigError for values that cannot be read.
    """
    if isinstance(source, dict):
        given = dict(source)
    else:
        names = ("quant_method", "bits", "group_size", "zero_point", "modules_to_not_convert")
        given = {name: getattr(source, name, None) for name in names}
        given["version"] = getattr(source, "format", None) or getattr(source, "version", "gemm")
    return settings.AwqConfig.from_file(given)


# transformers compares the class's name when one is given by hand
class AwqConfig(transformers.AwqConfig):
    """transformers' config object without its demands on other packages, and with every layout of
    AutoAWQ."""

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        zero_point: bool = True,
        **others: Any,
    ) -> None:
        self.quant_method = transformers.utils.quantization_config.QuantizationMethod.AWQ
        keep = {"w_bit", "q_group_size", "version", "format", "modules_to_not_convert"}

        given: dict[str, Any] = {}
        for key, value in others.items():
            if key in keep and value is not None:
                given[key] = value

        bits = given.pop("w_bit", bits)
        group_size = given.pop("q_group_size", group_size)
        given |= {"bits": bits, "group_size": group_size, "zero_point": zero_point}
        chosen = storage_settings(given)

        self.bits = chosen.bits
        self.group_size = chosen.group_size
        self.zero_point = chosen.zero_point
        self.version = self.format = chosen.format
        self.modules_to_not_convert = list(chosen.modules_to_not_convert) or None
        self.do_fuse = False

    def to_dict(self) -> dict[str, Any]:
        return storage_settings(self).to_transformers_dict()


class AwqHfQuantizer(HfQuantizer):
    """Loads AWQ checkpoints into `WQLinear`. Keeps the dtype that was asked for; needs no compiled
    extension."""

    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, dict):
            quantization_config = AwqConfig.from_dict(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert = list(
            getattr(quantization_config, "modules_to_not_convert", None) or []
        )
        self.matched: dict[str, str] = {}
        self.packed: PackedTensors = {}
        self.stored: list[str] = []  # names of all tensors in the files

        # module name → the packed one that stands in this place, too
        self.shared: dict[str, str] = {}
        self.scaled: list[str] = []  # names of the activations whose output is divided by scales

    @property
    def settings(self) -> settings.AwqConfig:
        """The storage settings of the checkpoint."""
        return storage_settings(self.quantization_config)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ConfigError for settings this package cannot read, before the model is built."""
        _ = self.settings

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """transformers 4.x: no dtype means float16, AutoAWQ's, on an accelerator and float32 on a
        CPU."""
        return dtype or (torch.float16 if torch.cuda.is_available() else torch.float32)

    update_torch_dtype = update_dtype  # its name until transformers 4.55

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        headers = tensor_headers(files_of(model.config, kwargs.get("checkpoint_files")))
        self.stored = list(headers)
        self.packed = packed_among(headers)
        check_packed(self.packed)
        if headers and not self.packed:
            raise CheckpointError(
                f"the config of {model.config._name_or_path} has a quantization_config, but its "
                "files hold no packed weights; "
                "remove quantization_config from config.json."
            )

        self.scaled = place_activation_scales(model, headers)
        expose_experts(model, names_in_files(model, self.packed))
        expose_sorted(model, sorted_in_files(model, self.packed))
        self.glued = GluedLinears(model, self.packed, self.settings)
        whole = {name: t for name, t in self.packed.items() if name not in self.glued.rows}
        self.matched = replace_linears(model, self.settings, whole)
        check_stored_biases(self.packed, headers)
        check_stored_floats(model, headers, model.config._name_or_path)
        self.shared = stored_elsewhere(model, self.matched)
        for name in self.shared:
            replace_module(model, name, nn.Identity())  # which has no tensors that could be missing

        untie_packed(model, [*self.matched, *self.shared])
        for name in self.matched:
            # Some models initialise their linears' `weight` by name after loading, which passes
            # over what is marked as loaded.
            module: Any = model.get_submodule(name)
            sizes = module.out_features, module.in_features
            module.weight = _initialised(torch.empty(sizes, device="meta"))

        for experts in named_experts(model).values():
            for name in weight_names(experts.shape):
                holder, leaf = holder_of(experts.original, name)
                object.__setattr__(holder, leaf, _initialised(torch.empty(0)))

        self.shapes = parameter_shapes(model)
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        for name in self.matched:
            model.get_submodule(name).__dict__.pop("weight", None)

        for experts in named_experts(model).values():
            for name in weight_names(experts.shape):
                holder, leaf = holder_of(experts.original, name)
                holder.__dict__.pop(leaf, None)

        check_parameter_shapes(model, self.shapes)
        settle_dtypes(model, self.dtypes)
        restore_packed(model, self.matched, self.packed)
        check_loaded(model, self.matched, self.packed)
        if self.stored:
            check_blocks(model, self.stored, self.matched, self.glued.names)

        self.glued.load(model)
        check_packed_numbers(model, [*self.matched, *self.glued.names, *self.scaled])
        for name, source in self.shared.items():
            replace_module(model, name, model.get_submodule(source))

        pack_experts(model)
        prepare(model)
        if getattr(self.quantization_config, "do_fuse", False):  # of 4.x, put there while loading
            logger.warning(
                "do_fuse has no effect in from_pretrained; "
                "AutoAWQForCausalLM.from_quantized(path, fuse_layers=True) fuses."
            )

        leave_files(model)
        trim()
        self.packed = {}
        self.stored = []

        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, AwqExperts):
                replace_module(model, name, module.dequantized(dtype or model.dtype))
            if isinstance(module, WQLinear):
                dense = nn.Linear(
                    module.in_features, module.out_features, module.bias is not None, device="meta"
                )
                dense.weight = nn.Parameter(module.dequantize(dtype or model.dtype))
                bias: Any = module.bias
                if bias is not None:
                    dense.bias = nn.Parameter(bias.to(dense.weight.dtype))

                replace_module(model, name, dense)

        conceal_sorted(model)
        return model


def _initialised(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that transformers' initialisation passes over."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def replace_linears(
    model: Any,
    config: settings.AwqConfig,
    packed: PackedTensors,
) -> dict[str, str]:
    """Puts an empty `WQLinear` where the checkpoint has packed weights, in place; returns module
    name → name in the files.

    packed: headers of the packed tensors; when empty, every linear but the excluded ones and the
    output head is meant. Raises CheckpointError when the files hold packed weights but none belongs
    to this model, or their shapes belong to other settings than the config's.
    """
    linears = named_linears(model)
    if packed:
        matched = match_names(model, packed)
        for name, stored in matched.items():
            check_shapes(stored, linears[name], packed[stored], config)
    else:
        head = output_head(model)
        skipped = config.modules_to_not_convert
        matched = {
            n: n
            for n, m in linears.items()
            if m is not head and not any(f".{p}." in f".{n}." for p in skipped)
        }

    for name in matched:
        module: Any = linears[name]
        in_features, out_features = linear_shape(module)
        size = config.group_size_of(in_features, name)
        place = module.weight.device
        dtype = module.weight.dtype
        bias = getattr(module, "bias", None) is not None
        replace_module(
            model,
            name,
            WQLinear(in_features, out_features, bias, size, config.format, place, dtype),
        )

    return matched


def mark_quantized(model: Any, config: settings.AwqConfig) -> None:
    """Brings a model that was quantized in memory into the state of a loaded one, so that
    transformers knows what it is.

    transformers' own `save_pretrained` and `push_to_hub`, sentence-transformers' save, and PEFT
    then treat it as such.
    """
    dense = sorted(named_linears(model))
    stored = config.with_(modules_to_not_convert=tuple(dense)).to_transformers_dict()
    quantizer = AwqHfQuantizer(
        AwqConfig(**{k: v for k, v in stored.items() if k != "quant_method"})
    )
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method


def register() -> None:
    """Makes transformers load `quant_method: "awq"` through this package. `import awq` arranges it;
    calling again is harmless."""
    current = [table.get(settings.METHOD) for table in _TABLES]
    if current[0] is not AwqHfQuantizer:
        _previous[:] = [getattr(entry, "previous", entry) for entry in current]
        for table, ours in zip(_TABLES, (AwqHfQuantizer, AwqConfig)):
            table.update(dict.fromkeys(settings.METHODS, ours))

    refuse_unread(modeling_utils)


def unregister() -> None:
    """Gives transformers its own AWQ loader back."""
    register()
    allow_unread(modeling_utils)
    for table, entry in zip(_TABLES, _previous):
        for name in settings.METHODS:
            table.pop(name, None)
        table[settings.METHOD] = entry
