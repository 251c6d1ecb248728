"""From hidden states to sentence embeddings: pooling, dense heads and normalisation of
sentence-transformers directories.

Rows are padded on the right, always: with rotary or relative positions the side makes no
difference, with absolute ones the right is the only right side.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from awq.checkpoint.account import is_finite
from awq.checkpoint.files import FLOATS, read_header, read_json
from awq.errors import CheckpointError, ModelError

# joined in this order
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_FLAGS = {
    f"pooling_mode_{mode}" + ("_tokens" if mode in ("max", "mean", "weightedmean") else ""): mode
    for mode in MODES
}
_FLAGS["pooling_mode_cls_token"] = "cls"


class HeadSettings:
    """`config.json` of a module's folder; every value is asked for by type. Raises CheckpointError
    for others."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        self.values = read_json(self.path)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {name} is {value!r:.100}; it must be true or false."
            )
        return value

    def size(self, name: str) -> int:
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path}: {name} is {value!r:.100}; it must be a whole number of at least 1."
            )
        return value

    def activation(self, features: int) -> nn.Module:
        """The module of `torch.nn` that `activation_function` names, tried on [2, features]."""
        value = self.values.get("activation_function", "torch.nn.modules.activation.Tanh")
        spelled = value if isinstance(value, str) else ""
        module, _, name = spelled.rpartition(".")
        kind = getattr(nn, name, None) if module.startswith("torch.nn.") else None
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise CheckpointError(
                f"{self.path}: activation_function {value!r:.100} is not one of torch.nn's."
            )

        try:
            with torch.device("meta"):  # some are whole models
                found = kind().eval()
        except TypeError as error:
            raise CheckpointError(
                f"{self.path}: activation_function {name} needs settings of its own."
            ) from error

        weights = any(True for _ in (*found.parameters(), *found.buffers()))
        if weights or not _keeps_rows(found, features):
            raise CheckpointError(
                f"{self.path}: activation_function {name} has weights, or does not make one row of "
                "features of another."
            )
        return found


def _keeps_rows(module: nn.Module, features: int) -> bool:
    try:
        found = module(torch.zeros(2, features, dtype=torch.float32))
    except Exception:  # a loss asks for a target, an image's activation for channels
        return False
    return isinstance(found, Tensor) and found.dim() == 2 and len(found) == 2


def _dense_tensors(folder: Path) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in], bias [out] or None) of a dense head, float32 and finite; its header is
    read before its numbers."""
    path = folder / "model.safetensors"
    header = read_header(path)
    if set(header) not in ({"linear.weight"}, {"linear.weight", "linear.bias"}):
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(header)[:3])}; a dense head has linear.weight and "
            "linear.bias."
        )

    for name, entry in header.items():
        if entry["dtype"] not in FLOATS:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}; it must be a floating one."
            )

    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{path} holds numbers that are not finite in {name}; download or make it again."
            )

    return tensors["linear.weight"], tensors.get("linear.bias")


class Pooling(nn.Module):
    """Hidden states [texts, tokens, features] to float32 [texts, modes × features]."""

    def __init__(self, modes: tuple[str, ...] = ("mean",), include_prompt: bool = True) -> None:
        super().__init__()
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            raise ModelError(
                f"pooling mode {unknown or modes} is unknown; known are {', '.join(MODES)}."
            )

        self.modes = modes
        self.include_prompt = include_prompt

    @classmethod
    def read(cls, folder: Path) -> Pooling:
        """From `config.json` of a pooling folder, in the old spelling (one flag per mode) or the
        new one."""
        settings = HeadSettings(folder)
        named = settings.values.get("pooling_mode")
        if named is None:
            flags = {mode for key, mode in _FLAGS.items() if settings.flag(key, False)}
            named = [mode for mode in MODES if mode in flags] or ["mean"]

        modes = [named] if isinstance(named, str) else named
        if not isinstance(modes, list) or not all(mode in MODES for mode in modes) or not modes:
            raise CheckpointError(
                f"{settings.path}: pooling_mode is {named!r:.100}; known are {', '.join(MODES)}."
            )
        return cls(tuple(modes), settings.flag("include_prompt", True))

    def forward(self, hidden: Tensor, mask: Tensor, prompt_tokens: int = 0) -> Tensor:
        """mask: 1 on real tokens [texts, tokens]. prompt_tokens: leading tokens left out when
        prompts are not pooled."""
        hidden = hidden.float()
        last = mask.sum(1) - 1

        first = 0
        if prompt_tokens and not self.include_prompt:
            first = min(prompt_tokens, mask.shape[1] - 1)
            mask = mask.clone()
            mask[:, :first] = 0

        weights = mask.unsqueeze(-1).float()
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device).view(1, -1, 1)
        found = {
            "cls": lambda: hidden[:, first],
            "max": lambda: hidden.masked_fill(weights == 0, -torch.inf).amax(1),
            "mean": lambda: (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9),
            "mean_sqrt_len_tokens": lambda: (
                (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt()
            ),
            "weightedmean": lambda: (
                (hidden * weights * positions).sum(1) / (weights * positions).sum(1).clamp(min=1e-9)
            ),
            "lasttoken": lambda: hidden[torch.arange(len(hidden), device=hidden.device), last],
        }

        return torch.cat([found[mode]() for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """A dense head in float32: linear, then an activation of `torch.nn`."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation

    @classmethod
    def read(cls, folder: Path) -> Dense:
        """From `config.json` and `model.safetensors` of a dense folder."""
        settings = HeadSettings(folder)
        names = ("module_input_name", "module_output_name")
        elsewhere = {settings.values.get(name) for name in names} - {None, "sentence_embedding"}
        if settings.flag("use_residual", False) or elsewhere:
            raise ModelError(
                f"{folder}: a dense head with these settings is read by sentence-transformers only."
            )

        weight, bias = _dense_tensors(folder)
        wanted = [settings.size("out_features"), settings.size("in_features")]
        if list(weight.shape) != wanted:
            raise CheckpointError(
                f"{folder}: the weight is {list(weight.shape)}, and config.json says {wanted}."
            )
        if settings.flag("bias", True) != (bias is not None) or (
            bias is not None and list(bias.shape) != wanted[:1]
        ):
            raise CheckpointError(
                f"{folder}: the bias in model.safetensors is not the one that config.json speaks "
                "of."
            )

        linear = nn.Linear(wanted[1], wanted[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)

        return cls(linear, settings.activation(wanted[0]))

    def forward(self, embeddings: Tensor) -> Tensor:
        given = embeddings.shape[-1]
        taken = self.linear.in_features
        if given != taken:
            raise CheckpointError(
                f"a dense head takes {taken} features, and what stands before it gives {given}: "
                "the modules do not belong together."
            )

        return self.activation(self.linear(embeddings))


class Normalize(nn.Module):
    """L2 norm 1."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings, dim=-1)


def through_heads(
    heads: nn.ModuleList,
    hidden: Tensor,
    mask: Tensor,
    prompt_tokens: int = 0,
) -> Tensor:
    """Embeddings [texts, features] of hidden states [texts, tokens, features], padding on the
    right: a pooling, then what follows it."""
    embeddings = heads[0](hidden, mask, prompt_tokens)
    for head in list(heads)[1:]:
        embeddings = head(embeddings)
    return embeddings


def read_head(kind: str, folder: Path) -> nn.Module:
    """One module of `modules.json` after the transformer. Raises ModelError for a kind that only
    sentence-transformers knows."""
    if kind == "Normalize":
        return Normalize()
    if kind not in ("Pooling", "Dense"):
        raise ModelError(
            f"{folder}: a module of kind {kind} is read by sentence-transformers only: use "
            "SentenceTransformer(directory), "
            "which loads quantized directories after `import awq`."
        )
    return Pooling.read(folder) if kind == "Pooling" else Dense.read(folder)
