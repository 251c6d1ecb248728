"""`NativeEncoder`: embeddings from a model that was compiled before; no torch, no transformers.

A process needs 0.1 GB instead of 0.5 and is ready in a fraction of a second. What is missing, the
compiled image, another process makes: it loads the model as `Encoder` does, compiles and proves it,
and stores the image for all processes to come.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from awq.errors import ConfigError, ModelError
from awq.native import matrix_unit, store
from awq.native.image import Image
from awq.native.machine import host_name
from awq.native.request import check_arguments, checked_texts
from awq.native.runner import Runner
from awq.native.sources import add_file, sources
from awq.native.tokens import Rows, TextTokens

logger = logging.getLogger("awq.native")

ENDING = ".encoder"


class NativeEncoder:
    """Texts to embeddings on a CPU. `NativeEncoder.from_pretrained(directory)` makes one."""

    def __init__(self, image: Image) -> None:
        texts = image.texts
        self._runner = Runner(image)
        self._tokens = TextTokens(texts["tokenizer"], texts["longest"], texts["side"])
        self._texts = texts
        self.prompts: dict[str, str] = texts["prompts"]
        self.max_seq_length: int = texts["longest"]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: str = "auto",
        precision: str = "exact",
    ) -> NativeEncoder:
        """Of a local directory, quantized, as `Encoder.from_pretrained` reads it.

        dtype: "auto", "float32", "float16" or "bfloat16", of what is not packed. The first time a
        model is opened with these arguments a second process compiles it, which takes as long as
        loading it through `Encoder`. Raises ModelError for a model that cannot be compiled, with
        the reason.
        """
        root = Path(path)
        if not root.is_dir():
            raise ModelError(f"model {path} does not exist as a directory.")

        name = image_name(root, dtype, precision)
        content = store.load(name)
        if content is None:
            _prepare(root, dtype, precision)
            content = store.load(name)

        if content is None:
            raise ModelError(
                f"the compiled encoder of {path} cannot be kept: {store.VARIABLE} must name a "
                "folder that this user alone may write to."
            )
        return cls(Image.from_bytes(content))

    def encode(
        self,
        texts: str | Sequence[str],
        normalize: bool = False,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        prompt: str | None = None,
    ) -> np.ndarray:
        """Embeddings, float32: [texts, features] in the order given, or [features] for a single
        string. Arguments and errors are those of `Encoder.encode`.

        >>> from awq import NativeEncoder
        >>> encoder = NativeEncoder.from_pretrained("my-encoder-awq")
        >>> encoder.encode(["an old tree", "the red house"], normalize=True).shape
        (2, 64)
        """
        if isinstance(texts, str):
            return self.encode([texts], normalize, prompt_name, truncate_dim, prompt)[0]

        checked = checked_texts(texts)
        check_arguments(truncate_dim, prompt)
        before = prompt if prompt is not None else self._prompt(prompt_name)
        ids, types = self._rows([before + text for text in checked])
        why_not = self._runner.why_not(ids)
        if why_not is not None:
            raise ConfigError(f"{why_not}; Encoder takes such texts.")

        skipped = self._prompt_tokens(before)
        found = self._runner.embeddings(ids, types, skipped, self._runner.helpers)
        kept = self._texts["truncate_dim"] if truncate_dim is None else truncate_dim
        found = found[:, :kept]

        return _normalized(found) if normalize else found

    def _rows(self, texts: list[str]) -> tuple[Rows, Rows | None]:
        if self._texts["lower_case"]:
            texts = [text.lower() for text in texts]
        ids, types = self._tokens(texts)
        if not all(ids):  # an empty text, with a tokenizer that adds no special tokens
            pad = self._texts["pad"]
            ids = [row or [pad] for row in ids]
            types = [row or [0] for row in types]

        has_types = self._texts["has_types"]
        return ids, types if has_types else None

    def _prompt(self, name: str | None) -> str:
        name = name if name is not None else self._texts["default_prompt"]
        if name is None:
            return ""
        if name not in self.prompts:
            raise ConfigError(
                f"prompt_name is {name!r:.100}; the model's prompts are {', '.join(self.prompts)}."
            )
        return self.prompts[name]

    def _prompt_tokens(self, prompt: str) -> int:
        """Leading tokens that are not pooled."""
        if not prompt or self._texts["include_prompt"]:
            return 0
        ids = self._rows([prompt])[0][0]
        # a closing special token is not the prompt's
        return len(ids) - (ids[-1] in self._texts["special"])


def _normalized(rows: np.ndarray) -> np.ndarray:
    sizes = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return rows / np.maximum(sizes, 1e-12)[:, None]


def image_name(root: Path, dtype: str, precision: str) -> str:
    """Of the stored image: by the model's files, the arguments, this CPU and the versions."""
    found = hashlib.sha256()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for path in files:
        found.update(f"\0{path.relative_to(root)}\0".encode())
        add_file(found, path)

    place = f"{host_name()} matrix unit {matrix_unit.is_usable()}"
    found.update(f"\0{dtype}\0{precision}\0{place}\0{sources()}".encode())

    return found.hexdigest() + ENDING


def _prepare(root: Path, dtype: str, precision: str) -> None:
    """Raises ModelError with what the other process says."""
    logger.info("%s is compiled once, in another process.", root)
    command = [sys.executable, "-m", "awq.embed.prepare", str(root), dtype, precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise ModelError(f"{root} is not compiled: {lines[-1]}")
