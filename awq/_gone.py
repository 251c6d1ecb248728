"""AutoAWQ's modules that have no counterpart here: importing one says in one line what to use."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

_INSTEAD = {
    "awq.evaluation": "`awq eval` measures perplexity, and `awq eval --tasks` runs lm-eval's tasks",
    "awq.models": "AutoAWQForCausalLM opens every architecture",
    "awq.modules": "the kernels of packed linears are chosen by device",
    "awq.modules.fused": "from_quantized(path, fuse_layers=True) fuses the blocks it can prove",
    "awq.quantize": "model.quantize does all of it",
    "awq.utils.calib_data": "awq.load_calibration makes calibration batches of any texts",
    "awq.utils.qwen_vl_utils": "quantize(processor, calib_data=samples) takes images beside text",
}


class _Finder:
    """Asked last, so only for what does not exist."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """Raises ModuleNotFoundError for a module that AutoAWQ may have had."""
        parts = name.split(".")
        parents = [".".join(parts[:count]) for count in range(len(parts), 1, -1)]
        found = next((parent for parent in parents if parent in _INSTEAD), None)
        if found is None:
            return None
        raise ModuleNotFoundError(
            f"No module named {name!r}: this package has another inside than AutoAWQ's, and "
            f"{_INSTEAD[found]} (docs/migrate.md).",
            name=name,
        )


def install() -> None:
    """Puts the finder behind all others, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # type: ignore[arg-type]
