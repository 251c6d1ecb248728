"""Which files of a directory belong to the model in it, and which are its user's."""

from __future__ import annotations

import logging
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from awq.checkpoint.companions import is_temporary, module_folders
from awq.checkpoint.files import INDEX_FILE, shards_of
from awq.errors import CheckpointError

logger = logging.getLogger("awq.checkpoint")

# What readers of models interpret. Everything else in a directory is its user's.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "quant_config.json",
    "quantization_report.json",
    "README.md",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def is_model_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in MODEL_FILES)


def names_of_model(target: Path) -> set[str]:
    """Names at the top of a directory that belong to the model in it: interpreted files, its
    shards, its modules' folders."""
    if not target.is_dir():
        return set()

    names = {path.name for path in target.iterdir() if is_model_file(path.name)}
    if (target / "config.json").exists():
        names |= module_folders(target)
        try:
            names |= set(shards_of(target / INDEX_FILE))
        except CheckpointError:
            logger.debug("%s has no index of shards that can be read", target)

    return names


def keep_users_files(old: Path, new: Path) -> None:
    """Gives the new directory, by links or copies, what the old one has beside its model."""
    if not old.is_dir():
        return

    gone = names_of_model(old)
    for path in sorted(old.iterdir()):
        if path.name in gone or is_temporary(path.name):
            continue
        _carry(path, new / path.name)


def _carry(path: Path, place: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        place.mkdir(exist_ok=True)
        for inner in sorted(path.iterdir()):
            _carry(inner, place / inner.name)
        shutil.copystat(path, place)
    elif not os.path.lexists(place):
        try:
            os.link(path, place, follow_symlinks=False)
        except OSError:  # file systems without hard links
            shutil.copy2(path, place, follow_symlinks=False)
