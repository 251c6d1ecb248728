"""Converting a saved checkpoint between the packed versions, tensor by tensor and exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from awq.checkpoint.files import check_directory, weight_files
from awq.checkpoint.save import complete_directory, read_settings
from awq.config import normalize_format
from awq.errors import CheckpointError
from awq.formats import get_format


def convert_checkpoint(source: str | Path, target: str | Path, version: str) -> int:
    """Rewrites the checkpoint in `source` as `version` ("gemm", "gemv", "gemv_fast") into `target`.

    Returns the number of converted linears. Raises CheckpointError for a broken or unquantized source.
    """
    version, source = normalize_format(version), Path(source)
    check_directory(source)
    config = read_settings(source)
    if Path(target).resolve() == source.resolve():
        raise CheckpointError(f"target {target} is the source; give another directory.")
    count, weight_map, total = 0, {}, 0
    with complete_directory(target) as work:
        shutil.copytree(source, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        for other in source.rglob("*.safetensors"):
            if other.parent != source:
                shutil.copy(other, work / other.relative_to(source))
        for path in weight_files(source):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {"format": "pt"}
            for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
                _convert(tensors, name, config.format, version, config.group_size)
                count += 1
            save_file(tensors, work / path.name, metadata=metadata)
            weight_map |= dict.fromkeys(tensors, path.name)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        if (source / "model.safetensors.index.json").is_file():
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        settings = json.loads((work / "config.json").read_text(encoding="utf-8"))
        settings["quantization_config"]["version"] = version
        (work / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return count


def _convert(tensors: dict, name: str, old: str, new: str, group_size: int) -> None:
    """Replaces one linear's three tensors in place."""
    try:
        parts = {k: tensors.pop(f"{name}.{k}") for k in ("qweight", "qzeros", "scales")}
    except KeyError as error:
        raise CheckpointError(f"{name} lacks {error} in the file that holds its qweight.") from error
    rows, columns = parts["qweight"].shape
    shape = {"gemm": (rows, columns * 8), "gemv": (columns * 8, rows), "gemv_fast": (columns, rows * 4)}[old]
    weight = get_format(old).unpack(parts, *shape, shape[0] if group_size == -1 else group_size)
    tensors.update({f"{name}.{k}": t for k, t in get_format(new).pack(weight).items()})
