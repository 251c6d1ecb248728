"""`python -m awq.embed.prepare DIRECTORY DTYPE PRECISION`: compiles, proves and stores an encoder's
image for `NativeEncoder`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from awq.embed.encoder import Encoder
from awq.embed.heads import Normalize, Pooling
from awq.errors import AwqError, ModelError
from awq.native import store
from awq.native.encoder import image_name


def prepare(root: Path, dtype: str, precision: str) -> None:
    """Raises ModelError for a model that has no image, with the reason."""
    name = image_name(root, dtype, precision)
    encoder = Encoder.from_pretrained(root, "cpu", dtype, precision=precision)
    texts = _texts(encoder)
    native = encoder.native
    if native is None:
        raise ModelError(f"{encoder.compiled.reason}.")

    image = replace(native.runner.image, texts=texts)
    store.save(name, image.to_bytes())


def _texts(encoder: Encoder) -> dict[str, Any]:
    """What lies between a string and token ids. Raises ModelError."""
    pooling, *others = encoder.heads
    quick = encoder.quick_tokens
    if any(not isinstance(head, Normalize) for head in others):
        raise ModelError("it has dense heads; use Encoder.")
    if quick is None or encoder.known_ids is not None:
        raise ModelError("its tokenizer is not one that the tokenizers library alone can be.")

    assert isinstance(pooling, Pooling)
    tokenizer = encoder.tokenizer

    return {
        "tokenizer": quick.definition,
        "longest": encoder.max_seq_length,
        "side": quick.side,
        "has_types": quick.has_types,
        "lower_case": encoder.cased("A") == "a",
        "pad": encoder.padding["input_ids"],
        "special": list(tokenizer.all_special_ids),
        "prompts": encoder.prompts,
        "default_prompt": encoder.default_prompt_name,
        "include_prompt": pooling.include_prompt,
        "truncate_dim": encoder.truncate_dim,
    }


def main() -> None:
    path, dtype, precision = sys.argv[1:]
    try:
        prepare(Path(path), dtype, precision)
    except AwqError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
