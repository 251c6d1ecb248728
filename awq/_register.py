"""Registers our loader with transformers the moment transformers' quantizers are imported, and not before.

`import awq` must stay light, and `AutoModel.from_pretrained(quantized_dir)` must work after it: a finder waits for the import
of `transformers.quantizers.auto` and calls `_register()` behind it. This is the only thing `import awq` changes.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_TARGET = "transformers.quantizers.auto"
_TABLES = {"AUTO_QUANTIZER_MAPPING": "AwqHfQuantizer", "AUTO_QUANTIZATION_CONFIG_MAPPING": "AwqConfig"}


class _Finder:
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        spec = PathFinder.find_spec(name, path)
        loader = getattr(spec, "loader", None)
        if spec is None or loader is None:
            return None
        run = loader.exec_module

        def exec_module(module) -> None:
            run(module)
            _register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Later:
    """Stands in transformers' tables until the first AWQ checkpoint is loaded, so that nothing of ours is imported before."""

    def __init__(self, name: str, previous: Any) -> None:
        self.name, self.previous = name, previous

    def _resolve(self) -> Any:
        from awq.checkpoint import hf

        hf.register()
        return getattr(hf, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve()(*args, **kwargs)

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve().from_dict(*args, **kwargs)


def _register() -> None:
    for table, ours in _TABLES.items():
        entries = getattr(sys.modules[_TARGET], table)
        entries["awq"] = _Later(ours, entries.get("awq"))


def install() -> None:
    """Registers now if transformers' quantizers are loaded, else when they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
