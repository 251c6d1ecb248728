"""The model card: what was quantized, how, and with what loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awq.config import AwqConfig

_TEMPLATE = """---
tags:
- awq
- 4-bit
{base}---

# {title}

{bits}-bit AWQ weights (arXiv 2306.00978), group size {group_size}, version `{format}`.

```python
import awq  # teaches transformers to load this checkpoint
from transformers import {auto}

model = {auto}.from_pretrained("{name}")
```
{figures}"""


def write_card(directory: Path, config: AwqConfig, report: Any = None, source: str | Path | None = None) -> None:
    """Writes README.md into `directory`."""
    name = Path(str(source)).name if source else "model"
    base = f"base_model: {source}\n" if source and not Path(str(source)).exists() else ""
    auto = "AutoModel" if (directory / "modules.json").exists() else "AutoModelForCausalLM"
    figures = "" if report is None else f"\n## Quantization\n\n```\n{report.summary()}\n```\n\nPer linear: `quantization_report.json`.\n"
    text = _TEMPLATE.format(
        base=base, title=f"{name} (AWQ)", bits=config.bits, group_size=config.group_size, format=config.format,
        auto=auto, name=f"{name}-awq", figures=figures,
    )  # fmt: skip
    (directory / "README.md").write_text(text, encoding="utf-8")
