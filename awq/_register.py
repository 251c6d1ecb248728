"""Registers our loader with transformers the moment transformers' quantizers are imported, and not before.

`import awq` must stay light, and `AutoModel.from_pretrained(quantized_dir)` must work after it: a finder waits for the import
of `transformers.quantizers.auto` and calls `register()` behind it. This is the only thing `import awq` changes.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_TARGET = "transformers.quantizers.auto"


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


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Stands in transformers' table until the first AWQ checkpoint is loaded, so that nothing of ours is imported before."""
    from awq.checkpoint.hf import AwqHfQuantizer, register

    register()
    return AwqHfQuantizer(*args, **kwargs)


def _register() -> None:
    previous = sys.modules[_TARGET].AUTO_QUANTIZER_MAPPING.get("awq")
    _quantizer.previous = previous  # type: ignore[attr-defined]
    sys.modules[_TARGET].AUTO_QUANTIZER_MAPPING["awq"] = _quantizer


def install() -> None:
    """Registers now if transformers' quantizers are loaded, else when they are."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
