"""The model card of a quantized directory: what it is made from, what that cost, and how to use it.

Its metadata are the hub's: the original as `base_model` with the relation "quantized", licence and
languages carried over from the original's own card.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from awq.checkpoint.files import first_architecture, read_json
from awq.checkpoint.modules import body_directory
from awq.checkpoint.recovery import recovery_rows
from awq.config import COMPRESSED_TENSORS, DENSE, AwqConfig

# What a reader must still be told about the original model: above all its licence.
_INHERITED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
_VLLM_GROUP_SIZES = (-1, 32, 64, 128)  # what vLLM's AWQ kernels take (0.33)

_TITLE = re.compile(rb"^# (.+)$", re.MULTILINE)
_USE = re.compile(rb"^## Use\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)

_PACKED = "{bits}-bit AWQ weights (arXiv 2306.00978), group size {group_size}, version `{format}`."
_DENSE = (
    "Dense weights that hold {bits}-bit AWQ values (arXiv 2306.00978), group size {group_size}: "
    "any reader loads them, at full size."
)
_COMPRESSED = (
    "{bits}-bit AWQ weights (arXiv 2306.00978), group size {group_size}, in the format of "
    "compressed-tensors."
)
_ABOUT = {DENSE: _DENSE, COMPRESSED_TENSORS: _COMPRESSED}  # all others are AWQ's
# The name on PyPI may still be AutoAWQ's, whose last version is 0.2.9.
_REGISTER = "import awq  # autoawq 0.3.0 or later, so that transformers loads this checkpoint\n"
_TRANSFORMERS = """
With transformers:

```python
{register}from transformers import {auto}

model = {auto}.from_pretrained("{name}")
```
"""
# Asymmetric files, as these are, do not load otherwise: compressed-tensors (0.20 at least) expects
# zero points that are not packed in a model that it is about to keep compressed.
_DENSE_WHEN_LOADED = "CompressedTensorsConfig(run_compressed=False)"
_COMPRESSED_TRANSFORMERS = """
With transformers (`pip install compressed-tensors`), as dense weights in memory:

```python
from transformers import {auto}, CompressedTensorsConfig

model = {auto}.from_pretrained("{name}", quantization_config={dense})
```
"""
_COMPRESSED_SENTENCES = """
With sentence-transformers (`pip install compressed-tensors`), as dense weights in memory:

```python
from sentence_transformers import SentenceTransformer
from transformers import CompressedTensorsConfig

model = SentenceTransformer("{name}", model_kwargs={{"quantization_config": {dense}}})
vectors = model.encode(["A sentence."])
```
"""
_SENTENCES = """
With sentence-transformers:

```python
{register}from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{name}").encode(["A sentence."])
```
"""
_ENCODER = """
With this package alone:

```python
from awq import Encoder

vectors = Encoder.from_pretrained("{name}").encode(["A sentence."])
```
"""
_GENERATE = """
With this package, which fuses the blocks:

```python
from awq import AutoAWQForCausalLM

model = AutoAWQForCausalLM.from_quantized("{name}", fuse_layers=True)
tokens = model.tokenizer("Hello", return_tensors="pt").to(model.device)
print(model.tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0]))
```
"""
_VLLM = """
With [vLLM](https://github.com/vllm-project/vllm), which needs no other package:

```bash
vllm serve {name}
```
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
    language it keeps.

    report: a `QuantReport`, for figures and settings. source: directory or hub id of the original.
    packed: False for dense weights with quantized values. name: of the new model; default: the
    original's with "-awq".
    """
    title = name or f"{Path(str(source)).name if source else 'model'}-awq"
    card = directory / "README.md"
    layout = config.format if packed else DENSE
    parts = [
        f"---\n{_metadata(card, directory, source)}---\n\n# {title}\n",
        _about(config, layout),
        _origin(source),
        "",
        _usage(directory, config, layout, title),
    ]
    if report is not None:
        parts += [*_recovery(report.evaluation), *_making(report)]

    # a name of another encoding is no text, and the card still is
    card.write_text("\n".join(parts), encoding="utf-8", errors="replace")


def rewrite_card(directory: Path, config: AwqConfig, old: str, new: str) -> None:
    """Makes the card in `directory` speak of the layout `new` where it spoke of `old`: what the
    weights are, and which programs read them. A card that is not this package's stays."""
    path = directory / "README.md"
    if not path.is_file():
        return

    card = path.read_bytes()  # what a stranger wrote need not be UTF-8
    sentence, title = _about(config, old).encode(), _TITLE.search(card)
    if sentence not in card or title is None:
        return

    name = title.group(1).decode("utf-8", "replace")
    card = card.replace(sentence, _about(config, new).encode())
    usage = _usage(directory, config, new, name).encode()

    def section(found: re.Match[bytes]) -> bytes:
        return usage if found.end() == len(card) else usage + b"\n"

    path.write_bytes(_USE.sub(section, card, count=1))


def with_name(card: bytes, name: str) -> bytes:
    """The card with another name of the model in its title and its snippets: that of the hub's
    repository, say. What a stranger wrote need not be UTF-8, and stays."""
    title = _TITLE.search(card)
    if title is None:
        return card

    old, new = title.group(1), name.encode()
    for form in (b"# %s\n", b'("%s"', b"vllm serve %s\n"):
        card = card.replace(form % old, form % new)
    return card


def hub_id(source: str | Path | None) -> str | None:
    """The hub's name of the model at `source`, or None for a local directory of unknown origin.

    >>> hub_id("/cache/models--owner--name/snapshots/0a1b"), hub_id("owner/name"), hub_id("/x")
    ('owner/name', 'owner/name', None)
    """
    if not source:
        return None

    path = Path(str(source))
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")

    return None if path.is_absolute() or path.exists() else str(source)


def _metadata(card: Path, directory: Path, source: str | Path | None) -> str:
    from huggingface_hub import ModelCardData, metadata_load

    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
    except Exception:  # a broken card of the original must not stop the saving of the new model
        found = {}

    sentences = (directory / "modules.json").exists()
    library = "sentence-transformers" if sentences else "transformers"
    fields: dict[str, Any] = {"library_name": library}
    if sentences:
        fields["pipeline_tag"] = "sentence-similarity"
    elif _auto_name(directory) == "AutoModelForCausalLM":
        fields["pipeline_tag"] = "text-generation"

    fields |= {key: found[key] for key in _INHERITED if found.get(key)}
    origin = hub_id(source)
    if origin is not None:
        fields |= {"base_model": origin, "base_model_relation": "quantized"}

    data = ModelCardData(**fields, tags=["awq", "4-bit", "quantized"])
    return data.to_yaml() + "\n"


def _origin(source: str | Path | None) -> str:
    origin = hub_id(source)
    if origin is not None:
        return f"Quantized from [{origin}](https://huggingface.co/{origin})."
    return f"Quantized from `{Path(str(source)).name}`." if source else ""


def _about(config: AwqConfig, layout: str) -> str:
    """What the weights are, in one sentence."""
    return _ABOUT.get(layout, _PACKED).format(
        bits=config.bits, group_size=config.group_size, format=layout
    )


def _usage(directory: Path, config: AwqConfig, layout: str, name: str) -> str:
    """The section with one snippet for each program that reads this directory."""
    auto = _auto_name(directory)
    packed = layout not in _ABOUT
    transformers, sentences = _TRANSFORMERS, _SENTENCES
    if layout == COMPRESSED_TENSORS:
        transformers, sentences = _COMPRESSED_TRANSFORMERS, _COMPRESSED_SENTENCES
    snippets = [transformers]
    if (directory / "modules.json").exists():
        snippets = [sentences, _ENCODER, transformers] if packed else [sentences, transformers]
    elif auto == "AutoModelForCausalLM":
        snippets += [_GENERATE] if packed else []
        snippets += [_VLLM] if _vllm_reads(config, layout) else []

    register = _REGISTER if packed else ""
    words = {"register": register, "auto": auto, "name": name, "dense": _DENSE_WHEN_LOADED}
    texts = [snippet.strip("\n").format(**words) + "\n" for snippet in snippets]
    return "\n".join(["## Use\n", *texts])


def readers_of(directory: Path, config: AwqConfig, layout: str) -> list[str]:
    """Programs that load a quantized directory, and what they need for it."""
    packed = layout not in _ABOUT
    extra = "after `import awq`" if packed else "with compressed-tensors"
    found = ["this package" if packed else "this package after `awq convert`"]
    found.append(f"transformers {extra}")
    if (directory / "modules.json").exists():
        found.append(f"sentence-transformers {extra}")
    elif _auto_name(directory) == "AutoModelForCausalLM" and _vllm_reads(config, layout):
        found.append("vLLM")
    return found


def _vllm_reads(config: AwqConfig, layout: str) -> bool:
    if layout == DENSE:
        return False  # it does, as any other model; nothing needs to be said
    fits = config.zero_point and config.group_size in _VLLM_GROUP_SIZES
    return fits and layout in ("gemm", COMPRESSED_TENSORS)


def _recovery(evaluation: Any) -> list[str]:
    """A table of what was measured before and after; nothing where nothing was measured."""
    if evaluation is None:
        return []
    rows = recovery_rows(evaluation.to_dict())
    lines = [f"| {figure} | {before} | {after} |" for figure, before, after in rows]
    return ["## Recovery\n", "| figure | original | quantized |", "|---|---|---|", *lines, ""]


def _making(report: Any) -> list[str]:
    """Settings, command and versions."""
    parts = ["## Quantization\n", f"```\n{report.summary()}\n```\n"]
    if report.command:
        parts.append(f"Made by\n\n```bash\n{report.command}\n```\n")
    settings = _listed(report.config | report.options)
    versions = _listed(report.versions)
    if settings:
        parts.append(f"Settings: {settings}.\n")
    if versions:
        parts.append(f"Versions: {versions}.\n")

    return [*parts, "Per linear: `quantization_report.json`.\n"]


def _listed(values: dict[str, Any]) -> str:
    """Like "preset fast, tuning 0": what a stranger needs to repeat it, not the machine's own."""
    left_out = ("device", "progress", "modules_to_not_convert")
    told = {key: value for key, value in values.items() if key not in left_out}
    return ", ".join(f"{key} {value}" for key, value in told.items() if value not in (None, (), []))


def _auto_name(directory: Path) -> str:
    config = read_json(body_directory(directory) / "config.json")
    architecture = first_architecture(config.get("architectures"))
    is_decoder = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if (directory / "modules.json").exists() or not is_decoder:
        return "AutoModel"
    return "AutoModelForCausalLM"
