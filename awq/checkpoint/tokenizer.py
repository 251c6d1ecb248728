"""The tokenizer beside a model, told apart from the empty one that transformers makes up when its
files are missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from awq.calibration.samples import tokenizer_of
from awq.calibration.sources import first_line
from awq.checkpoint.modules import body_directory
from awq.errors import ModelError

logger = logging.getLogger("awq.checkpoint")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False, **download: Any) -> Any:
    """The tokenizer of a local directory or hub id. Raises ModelError when there is none with a
    vocabulary."""
    place = body_directory(Path(path)) if Path(path).is_dir() else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, **download
        )
    except Exception as error:  # tokenizers fail in as many ways as there are kinds of them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} has no tokenizer that transformers can load: {reason}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # transformers 5 makes one up from the model type when the files are missing: every word
        # would be unknown.
        raise ModelError(
            f"{path} has no tokenizer files (a vocabulary is missing); copy them from the "
            "original model."
        )
    return tokenizer


def find_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The same, or None with a log line where `load_tokenizer` raises."""
    try:
        return load_tokenizer(path, trust_remote_code)
    except ModelError as error:
        logger.info("%s", error)
        return None


def find_processor(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The processor of a model that takes images or sound, or None."""
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # in as many ways as tokenizers
        logger.info("%s has no processor: %s", path, first_line(error))
        return None
    return None if tokenizer_of(processor) is processor else processor
