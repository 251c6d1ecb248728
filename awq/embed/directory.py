"""What a sentence-transformers directory says about a model: its modules, prompts and longest
input."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from awq.checkpoint.files import read_json
from awq.checkpoint.modules import is_embedder, read_modules
from awq.checkpoint.source import UNLIMITED, check_reachable, position_limit
from awq.errors import CheckpointError, first_line

logger = logging.getLogger("awq.embed")


@dataclass(frozen=True)
class SentenceSettings:
    """modules: (class name, folder) in the order of `modules.json`, the transformer first; empty
    without that file.

    max_length: longest input in tokens, if the directory sets one. prompts: name → text put before
    an input. truncate_dim: how many features of an embedding are kept; None: all.
    """

    modules: tuple[tuple[str, Path], ...] = ()
    max_length: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None


def sentence_settings(directory: str | Path) -> SentenceSettings:
    """Settings of a local directory; those of a plain transformers directory are empty. Raises
    CheckpointError for broken files."""
    root = Path(directory)
    modules = read_modules(root)
    general = _optional(root / "config_sentence_transformers.json")
    home = modules[0][1] if modules else root

    # Early releases named the file after the architecture: sentence_roberta_config.json and its
    # kin.
    files = sorted(home.glob("sentence_*_config.json"))
    inner = read_json(files[0]) if files else {}
    place = files[0] if files else root

    return SentenceSettings(
        modules=modules,
        max_length=_length(inner.get("max_seq_length"), place),
        lower_case=_flag(inner.get("do_lower_case"), place),
        prompts=_prompts(general.get("prompts"), root),
        default_prompt_name=_prompt_name(general, root),
        truncate_dim=_features(general, root),
    )


def _length(value: Any, place: Path) -> int | None:
    if value is None or value == 0:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 2:
        raise CheckpointError(
            f"{place}: max_seq_length is {value!r}; it must be a whole number of at least 2."
        )
    return value


def _flag(value: Any, place: Path) -> bool:
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{place}: do_lower_case is {value!r}; it must be true or false.")
    return bool(value)


def _prompts(value: Any, place: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(
            f"{place}/config_sentence_transformers.json: prompts must be texts by name, not "
            f"{value!r:.100}."
        )
    return dict(value)


def _prompt_name(general: dict[str, Any], place: Path) -> str | None:
    name = general.get("default_prompt_name")
    known = {"query", "document", *(general.get("prompts") or {})}
    if name is not None and (not isinstance(name, str) or name not in known):
        raise CheckpointError(
            f"{place}/config_sentence_transformers.json: default_prompt_name {name!r} is none of "
            "its prompts."
        )
    return name


def _features(general: dict[str, Any], place: Path) -> int | None:
    value = general.get("truncate_dim")
    if value is not None and (type(value) is not int or value < 1):
        raise CheckpointError(
            f"{place}/config_sentence_transformers.json: truncate_dim is {value!r:.100}; it must "
            "be a whole number of at least 1."
        )
    return value


def is_sentence_model(path: str | Path) -> bool:
    """Whether a local directory, or a hub model, is sentence-transformers' of a model for
    embeddings (not of a cross-encoder)."""
    if Path(path).exists() or str(path).startswith((".", "/", "~")):
        return is_embedder(Path(path))

    from huggingface_hub import snapshot_download

    check_reachable(path)
    try:
        files = ["modules.json", "config_sentence_transformers.json"]
        return is_embedder(Path(snapshot_download(str(path), allow_patterns=files)))
    # the hub's client has many ways to fail; a model that is missing is reported when it is loaded
    except Exception as error:
        logger.info("%s is taken for no sentence embedder: %s", path, first_line(error))
        return False


def longest_input(config: Any, tokenizer: Any, settings: SentenceSettings) -> int:
    """Longest input in tokens, special ones included: what the directory, the tokenizer and the
    positions all allow.

    The directory's own number counts more than the tokenizer's, never more than the positions that
    the model has.
    """
    positions = position_limit(config)
    if settings.max_length:
        return min(settings.max_length, positions or settings.max_length)

    limits = [positions, getattr(tokenizer, "model_max_length", None)]
    known = [n for n in limits if isinstance(n, int) and 0 < n < UNLIMITED]

    return min(known, default=512)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
