"""From hidden states to sentence embeddings: pooling, dense heads and normalisation of sentence-transformers directories.

Rows are padded on the right, always: with rotary or relative positions the side makes no difference, with absolute ones the
right is the only right side.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from awq.checkpoint.files import read_json
from awq.errors import CheckpointError, ModelError

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")  # joined in this order
_FLAGS = {f"pooling_mode_{mode}" + ("_tokens" if mode in ("max", "mean", "weightedmean") else ""): mode for mode in MODES}
_FLAGS["pooling_mode_cls_token"] = "cls"


class Pooling(nn.Module):
    """Hidden states [texts, tokens, features] to float32 [texts, modes × features]."""

    def __init__(self, modes: tuple[str, ...] = ("mean",), include_prompt: bool = True) -> None:
        super().__init__()
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            raise ModelError(f"pooling mode {unknown or modes} is unknown; known are {', '.join(MODES)}.")
        self.modes, self.include_prompt = modes, include_prompt

    @classmethod
    def read(cls, folder: Path) -> Pooling:
        """From `config.json` of a pooling folder, in the old spelling (one flag per mode) or the new one."""
        config = read_json(folder / "config.json")
        named = config.get("pooling_mode")
        flags = {_FLAGS[key] for key, value in config.items() if key in _FLAGS and value}
        modes = (named,) if isinstance(named, str) else tuple(named or [m for m in MODES if m in flags] or ["mean"])
        return cls(modes, config.get("include_prompt", True))

    def forward(self, hidden: Tensor, mask: Tensor, prompt_tokens: int = 0) -> Tensor:
        """mask: 1 on real tokens [texts, tokens]. prompt_tokens: leading tokens left out when prompts are not pooled."""
        hidden, last = hidden.float(), mask.sum(1) - 1
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
            "mean_sqrt_len_tokens": lambda: (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9).sqrt(),
            "weightedmean": lambda: (hidden * weights * positions).sum(1) / (weights * positions).sum(1).clamp(min=1e-9),
            "lasttoken": lambda: hidden[torch.arange(len(hidden), device=hidden.device), last],
        }
        return torch.cat([found[mode]() for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """A dense head in float32: linear, then an activation of `torch.nn`."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    @classmethod
    def read(cls, folder: Path) -> Dense:
        """From `config.json` and `model.safetensors` of a dense folder."""
        config = read_json(folder / "config.json")
        if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
            raise ModelError(f"{folder}: a dense head with these settings is read by sentence-transformers only: {config}.")
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"{folder} has no model.safetensors; save the model again with safetensors weights.")
        linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
        linear.load_state_dict({k.removeprefix("linear."): v.float() for k, v in load_file(folder / "model.safetensors").items()})
        module, _, name = config.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")
        kind = getattr(nn, name, None) if module.startswith("torch.nn.") else None
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ModelError(f"{folder}: activation {config['activation_function']} is not one of torch.nn's.")
        return cls(linear, kind())

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.activation(self.linear(embeddings))


class Normalize(nn.Module):
    """L2 norm 1."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings, dim=-1)


def read_head(kind: str, folder: Path) -> nn.Module:
    """One module of `modules.json` after the transformer. Raises ModelError for a kind that only sentence-transformers knows."""
    if kind == "Normalize":
        return Normalize()
    if kind not in ("Pooling", "Dense"):
        raise ModelError(
            f"{folder}: a module of kind {kind} is read by sentence-transformers only: use SentenceTransformer(directory), "
            "which loads quantized directories after `import awq`."
        )
    return Pooling.read(folder) if kind == "Pooling" else Dense.read(folder)
