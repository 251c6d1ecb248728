"""Packed linears that the source stores as one tensor, or as several: names on disk stay the
source's.

transformers splits `Wqkv` of Nomic's BERT into three linears, and joins MiniMax's `gate_proj` and
`up_proj` into one. All such converters move rows of weights about. Which row goes where is read off
the converters themselves, as names are in `expert_names`: stand-ins for all weights, whose rows are
numbered throughout the model, are sent the way of saving. Rows of a packed weight are independent
of each other, so they can be moved in the same way, exactly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from awq.checkpoint.files import PackedTensors
from awq.checkpoint.match import as_saved, check_shapes, merged_on_disk, unreturning
from awq.config import PACKED_TENSORS, AwqConfig
from awq.core.weight import QuantizedWeight
from awq.formats import get_format
from awq.nn.linear import WQLinear
from awq.nn.surgery import is_linear, linear_shape, named_linears, replace_module

logger = logging.getLogger("awq.checkpoint")

_COLUMNS = 2  # of a stand-in: rows whose columns differ were not moved as rows


@dataclass(frozen=True)
class StoredRows:
    """Of which rows a stored weight is made.

    linears: names of modules; owner, row: int64 [stored rows], index into `linears` and row there.
    """

    linears: tuple[str, ...]
    owner: Tensor
    row: Tensor


def stored_rows(model: Any, sizes: Mapping[str, int]) -> tuple[dict[str, StoredRows], set[str]]:
    """(stored module name → its rows, for what is not just one linear under another name; linears
    for which the source has no name of a module, or whose converter does more than move rows).

    sizes: outputs of the model's linears, by name.
    """
    touched = set(merged_on_disk(model, sizes))
    sizes = {name: size for name, size in sizes.items() if name in touched}
    if not sizes:
        return {}, set()
    with torch.device("cpu"):  # models are built on the meta device, and numbers need values
        return _rows_of(model, sizes)


def _rows_of(model: Any, sizes: Mapping[str, int]) -> tuple[dict[str, StoredRows], set[str]]:
    """Numbers all rows, saves the numbers as if they were weights, and reads where they went."""
    names = list(sizes)
    starts = torch.tensor([0, *sizes.values()]).cumsum(0)[:-1]
    try:
        saved = as_saved(model, _numbered(sizes))
    except Exception as error:  # converters may ask for more than there is
        logger.debug("converters cannot be read backwards: %s", error)
        return {}, set(sizes)

    found: dict[str, StoredRows] = {}
    stuck: set[str] = set()
    for key, tensor in saved.items():
        moved = tensor.dim() == 2 and tensor.shape[1] == _COLUMNS
        if not moved or not torch.equal(tensor[:, 0], tensor[:, 1]):
            return {}, set(sizes)

        numbers = tensor[:, 0].long()
        owner = torch.searchsorted(starts, numbers, right=True) - 1
        used = owner.unique()
        if len(used) == 1 and len(numbers) == sizes[names[int(used)]]:
            continue

        linears = tuple(names[i] for i in used.tolist())
        if not key.endswith(".weight"):
            stuck.update(linears)
            continue

        place = torch.searchsorted(used, owner)
        found[key.removesuffix(".weight")] = StoredRows(linears, place, numbers - starts[owner])

    return found, stuck


def _numbered(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Weights [rows, _COLUMNS] of the linears, in which every row holds its number."""
    numbers = torch.arange(sum(sizes.values()), dtype=torch.float64)
    weights = numbers.unsqueeze(1).repeat(1, _COLUMNS).split(list(sizes.values()))
    return {f"{name}.weight": weight for name, weight in zip(sizes, weights)}


def in_source_cut(model: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of a model, or of some of its blocks, under the names and in the cut of the source.

    tensors: by their names in the model; None: all. Where some of the linears that the source
    stores as one are dense, or quantized otherwise, they keep the model's names.
    """
    tensors = model.state_dict() if tensors is None else tensors
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = {*(model._keys_to_ignore_on_save or ()), *(n for n in tied if tied[n] in tensors)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    modules = _linears_of(model, rest)
    rows, stuck = stored_rows(model, {name: _outputs_of(m) for name, m in modules.items()})

    cut: dict[str, Tensor] = {}
    done: set[str] = set()
    for stored, found in rows.items():
        members = [modules[name] for name in found.linears]
        packed = [member for member in members if isinstance(member, WQLinear)]
        alike = len({(m.in_features, m.group_size, m.format) for m in packed}) == 1
        if packed and not (alike and len(packed) == len(members)):
            stuck.update(found.linears)
        elif packed:
            weights = [_packed_of(rest, name, modules[name]) for name in found.linears]
            whole = _gathered(weights, found.owner, found.row)
            stored_tensors = get_format(packed[0].format).pack(whole)
            cut |= {f"{stored}.{kind}": stored_tensors[kind] for kind in PACKED_TENSORS}
            done.update(found.linears)

    if stuck:
        logger.warning(
            "%s: %s … cannot be cut as in the source; they keep the names of the installed "
            "transformers.",
            type(model).__name__,
            min(stuck),
        )

    for name in done:  # one linear may be several tensors in the source
        for kind in PACKED_TENSORS:
            del rest[f"{name}.{kind}"]

    packed_names = {key.removesuffix(".qweight") for key in rest if key.endswith(".qweight")}
    stuck |= unreturning(model, packed_names - set(merged_on_disk(model, modules)))
    kept = {name: rest.pop(name) for name in list(rest) if name.rpartition(".")[0] in stuck}

    return as_saved(model, rest) | kept | cut


def _linears_of(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name → linear, dense or packed, of those whose weights are among the tensors."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        try:
            module = model.get_submodule(name)
        except AttributeError:  # an expert among packed ones
            continue
        if isinstance(module, WQLinear) or is_linear(module):
            found[name] = module
    return found


def _outputs_of(linear: nn.Module) -> int:
    if isinstance(linear, WQLinear):
        return linear.out_features
    return linear_shape(linear)[1]


def _packed_of(tensors: dict[str, Tensor], name: str, module: WQLinear) -> QuantizedWeight:
    """A packed weight out of a state dict."""
    parts = {kind: tensors[f"{name}.{kind}"] for kind in PACKED_TENSORS}
    sizes = module.in_features, module.out_features, module.group_size
    return get_format(module.format).unpack(parts, *sizes)


def _gathered(weights: list[QuantizedWeight], owner: Tensor, row: Tensor) -> QuantizedWeight:
    """The given rows of several weights as one."""
    starts = torch.tensor([0, *(len(weight.codes) for weight in weights)]).cumsum(0)
    return _taken(_joined(weights), starts[owner] + row)


def _joined(weights: list[QuantizedWeight]) -> QuantizedWeight:
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*(w[:3] for w in weights)))
    return QuantizedWeight(codes, scales, zeros)


def _taken(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    rows = rows.to(weight.codes.device)
    return QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.zeros[rows])


class Placeholder(nn.Module):
    """Stands for a linear whose packed weight is read later; its bias is loaded as always."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_shape(linear)
        weight: Any = linear.weight
        self.dtype = weight.dtype
        self.bias = linear.bias


class GluedLinears:
    """Linears of a model that is being loaded, whose packed weights the files hold in another cut.

    Puts placeholders in their place; `load` puts the packed linears there.
    """

    def __init__(self, model: Any, packed: PackedTensors, config: AwqConfig) -> None:
        linears = named_linears(model)
        sizes = {name: linear_shape(linear)[1] for name, linear in linears.items()}
        self.config = config
        self.packed = packed
        self.rows: dict[str, StoredRows] = {}

        for stored, found in stored_rows(model, sizes)[0].items():
            name = _in_files(stored, packed)
            if name is not None:
                self.rows[name] = found

        for name, found in self.rows.items():
            self._check(name, found, linears)
        owners = (found.linears for found in self.rows.values())
        self.names = sorted(set(chain.from_iterable(owners)))
        for name in self.names:
            replace_module(model, name, Placeholder(linears[name]))
        if self.names:
            _ignore_unexpected(model, [*self.names, *self.rows])

    def _check(self, stored: str, found: StoredRows, linears: Mapping[str, nn.Module]) -> None:
        """Raises CheckpointError where the files hold another shape than the model has."""
        inputs = linear_shape(linears[found.linears[0]])[0]
        whole = nn.Linear(inputs, len(found.row), device="meta")
        check_shapes(stored, whole, self.packed[stored], self.config)

    def load(self, model: Any) -> None:
        """Reads the packed weights from the files."""
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        weights: dict[str, list[QuantizedWeight]] = {name: [] for name in self.names}
        for stored, found in self.rows.items():
            weight = self._read(model, stored, found)
            for number, name in enumerate(found.linears):
                # one stored tensor may hold rows of several linears
                is_own = found.owner == number
                index = is_own.nonzero().squeeze(1)
                rows[name].append(found.row[index])
                weights[name].append(_taken(weight, index))

        for name in self.names:
            order = torch.cat(rows[name]).argsort()
            whole = _joined(weights[name])
            self._put(model, name, _taken(whole, order))

    def _put(self, model: Any, name: str, weight: QuantizedWeight) -> None:
        """A packed linear in the place of its placeholder."""
        place = model.get_submodule(name)
        linear = WQLinear.from_quantized(weight, place.bias, self.config.format, dtype=place.dtype)
        replace_module(model, name, linear.to(_device_near(model, name)))

    def _read(self, model: Any, stored: str, found: StoredRows) -> QuantizedWeight:
        inputs = model.get_submodule(found.linears[0]).in_features
        group_size = self.config.group_size_of(inputs, stored)

        tensors = {}
        for kind in PACKED_TENSORS:
            path = self.packed[stored][kind]["file"]
            with safe_open(path, "pt") as file:
                tensors[kind] = file.get_tensor(f"{stored}.{kind}")

        tensors["scales"] = tensors["scales"].half()
        codec = get_format(self.config.format)

        return codec.unpack(tensors, inputs, len(found.row), group_size)


def _in_files(stored: str, packed: PackedTensors) -> str | None:
    """The name that the files have, with or without a prefix of the model."""
    endings = [name for name in packed if name == stored or name.endswith(f".{stored}")]
    endings += [name for name in packed if stored.endswith(f".{name}")]
    return endings[0] if len(endings) == 1 else None


def _ignore_unexpected(model: Any, names: Iterable[str]) -> None:
    """Tells transformers that packed tensors of these names are no surprise."""
    leaves = "|".join(sorted({re.escape(name.rpartition(".")[2]) for name in names}))
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    pattern = rf"\b({leaves})\.({'|'.join(PACKED_TENSORS)})$"
    model._keys_to_ignore_on_load_unexpected = {*known, pattern}


def _device_near(model: nn.Module, name: str) -> torch.device:
    """Where the tensors around a module are."""
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        for tensor in chain(around.parameters(), around.buffers()):
            return tensor.device
    return torch.device("cpu")
