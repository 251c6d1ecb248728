"""What a sentence-transformers directory says about a model: its modules, prompts and longest input."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq.checkpoint.files import read_json
from awq.checkpoint.load import is_embedder
from awq.errors import CheckpointError

logger = logging.getLogger("awq.embed")


@dataclass(frozen=True)
class SentenceSettings:
    """modules: (class name, folder) in the order of `modules.json`, the transformer first; empty without that file.

    max_length: longest input in tokens, if the directory sets one. prompts: name → text put before an input.
    """

    modules: tuple[tuple[str, Path], ...] = ()
    max_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def sentence_settings(directory: str | Path) -> SentenceSettings:
    """Settings of a local directory; those of a plain transformers directory are empty. Raises CheckpointError for broken files."""
    root = Path(directory)
    modules: tuple[tuple[str, Path], ...] = ()
    if (root / "modules.json").is_file():
        try:
            listed = json.loads((root / "modules.json").read_text(encoding="utf-8"))
            modules = tuple((str(m["type"]).rpartition(".")[2], root / m["path"]) for m in listed)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{root / 'modules.json'} is not a list of sentence-transformers modules: {error!r}.") from error
    general = _optional(root / "config_sentence_transformers.json")
    home = modules[0][1] if modules else root
    # Early releases named the file after the architecture: sentence_roberta_config.json and its kin.
    inner = next((read_json(p) for p in sorted(home.glob("sentence_*_config.json"))), {})
    return SentenceSettings(
        modules, inner.get("max_seq_length"), bool(inner.get("do_lower_case")),
        dict(general.get("prompts") or {}), general.get("default_prompt_name"),
    )  # fmt: skip


def is_sentence_model(path: str | Path) -> bool:
    """Whether a local directory, or a hub model, is sentence-transformers' of a model for embeddings (not of a cross-encoder)."""
    if Path(path).exists() or str(path).startswith((".", "/", "~")):
        return is_embedder(path)
    from huggingface_hub import snapshot_download

    try:
        return is_embedder(snapshot_download(str(path), allow_patterns=["modules.json", "config_sentence_transformers.json"]))
    except Exception as error:  # the hub's client has many ways to fail; a model that is missing is reported when it is loaded
        logger.info("%s is taken for no sentence embedder: %s", path, str(error).split("\n")[0])
        return False


def longest_input(config: Any, tokenizer: Any, settings: SentenceSettings) -> int:
    """Longest input in tokens, special ones included: the directory's own, else what tokenizer and positions allow."""
    if settings.max_length:
        return settings.max_length
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    # A tokenizer without a limit says 10^30, and models with relative positions say nothing or −1.
    known = [n for n in limits if isinstance(n, int) and 0 < n < 1 << 24]
    return min(known, default=512)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
