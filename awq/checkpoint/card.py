"""The model card: what was quantized, how, and with what loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awq.checkpoint.files import read_json
from awq.checkpoint.modules import body_directory
from awq.config import AwqConfig

# What a reader must still be told about the original model: above all its licence.
_INHERITED = (
    "license",
    "license_name",
    "license_link",
    "language",
    "library_name",
    "pipeline_tag",
    "base_model",
)

_PACKED = """{bits}-bit AWQ weights (arXiv 2306.00978), group size {group_size}, version `{format}`.

```python
import awq  # teaches transformers to load this checkpoint
from transformers import {auto}

model = {auto}.from_pretrained("{name}")
```
"""
_DENSE = """Dense weights that hold {bits}-bit AWQ values (arXiv 2306.00978).
Group size {group_size}; any reader loads them, at full size.
"""
_FIGURES = """
## Quantization

```
{summary}
```

Per linear: `quantization_report.json`.
"""


def write_card(
    directory: Path,
    config: AwqConfig,
    report: Any = None,
    source: str | Path | None = None,
    packed: bool = True,
    name: str | None = None,
) -> None:
    """Writes README.md into `directory`, in place of the original model's card, whose licence and
    language it keeps."""
    original = Path(str(source)).name if source else "model"
    body = (_PACKED if packed else _DENSE).format(
        bits=config.bits,
        group_size=config.group_size,
        format=config.format,
        auto=_auto_name(directory),
        name=name or f"{original}-awq",
    )
    if report is not None:
        body += _FIGURES.format(summary=report.summary())
    card = directory / "README.md"
    text = f"---\n{_metadata(card, source)}---\n\n# {name or f'{original}-awq'}\n\n{body}"
    card.write_text(text, encoding="utf-8")


def _metadata(card: Path, source: str | Path | None) -> str:
    from huggingface_hub import metadata_load
    from huggingface_hub.utils import yaml_dump

    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
    except Exception:  # a broken card of the original must not stop the saving of the new model
        found = {}
    kept = {key: found[key] for key in _INHERITED if found.get(key)}
    if source and not Path(str(source)).exists():
        kept["base_model"] = str(source)
    return yaml_dump({**kept, "tags": ["awq", "4-bit", "quantized"]})


def _auto_name(directory: Path) -> str:
    architecture = (
        read_json(body_directory(directory) / "config.json").get("architectures") or [""]
    )[0]
    if (directory / "modules.json").exists() or not architecture.endswith(
        ("ForCausalLM", "LMHeadModel")
    ):
        return "AutoModel"
    return "AutoModelForCausalLM"
