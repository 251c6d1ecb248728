"""Registers this package with transformers and PEFT the moment they are imported, and not before.

`import awq` must stay light, and `AutoModel.from_pretrained(quantized_dir)` must work after it: a
finder waits for the imports of `_WAITING`, and calls the function that stands there behind each.
This is the only thing `import awq` changes.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from awq._unread import refuse_unread
from awq.config import METHOD, METHODS

_QUANTIZERS = "transformers.quantizers.auto"
_TABLES = {
    "AUTO_QUANTIZER_MAPPING": "AwqHfQuantizer",
    "AUTO_QUANTIZATION_CONFIG_MAPPING": "AwqConfig",
}


class _Finder:
    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in _WAITING:
            return None

        spec = PathFinder.find_spec(name, path)
        loader = getattr(spec, "loader", None)
        if spec is None or loader is None:
            return None

        run = loader.exec_module

        def exec_module(module) -> None:
            run(module)
            _WAITING[name](module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Later:
    """Stands in transformers' tables until the first AWQ checkpoint is loaded, so that nothing of
    ours is imported before."""

    def __init__(self, name: str, previous: Any) -> None:
        self.name = name
        self.previous = previous

    def _resolve(self) -> Any:
        from awq.checkpoint import hf

        hf.register()
        return getattr(hf, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve()(*args, **kwargs)

    def from_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve().from_dict(*args, **kwargs)


def _register_quantizer(auto: Any) -> None:
    for table, ours in _TABLES.items():
        entries = getattr(auto, table)
        entries.update(dict.fromkeys(METHODS, _Later(ours, entries.get(METHOD))))


def _register_adapters(_lora_model: Any) -> None:
    import awq.integrations.peft  # noqa: F401 (which registers itself)


_WAITING = {
    _QUANTIZERS: _register_quantizer,
    "transformers.modeling_utils": refuse_unread,
    "peft.tuners.lora.model": _register_adapters,
}


def install() -> None:
    """Registers now with what is loaded already, and with the rest when it is."""
    for name, register in _WAITING.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
