"""Machine code for this CPU, made by llvmlite, which carries LLVM in its wheel."""

from __future__ import annotations

from functools import cache
from typing import Any

MINIMUM = (0, 45)  # of llvmlite: the first with LLVM 20, hence with opaque pointers everywhere


@cache
def binding() -> Any:
    """llvmlite's binding, ready to compile. Raises ImportError, with what to do, when llvmlite is
    missing or too old."""
    try:
        import llvmlite
        from llvmlite import binding
    except ImportError as error:
        raise ImportError("llvmlite is not installed; pip install 'autoawq[cpu]'") from error

    version = tuple(int(part) for part in llvmlite.__version__.split(".")[:2])
    if version < MINIMUM:
        raise ImportError(
            f"llvmlite {llvmlite.__version__} is older than 0.45; pip install -U 'autoawq[cpu]'"
        )

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()

    return binding


def host_machine() -> Any:
    """LLVM's target machine for this CPU."""
    b = binding()
    return b.Target.from_default_triple().create_target_machine(
        cpu=b.get_host_cpu_name(),
        features=b.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def host_name() -> str:
    """All that machine code for this CPU depends on."""
    import llvmlite

    b = binding()
    version = ".".join(map(str, b.llvm_version_info))
    features = b.get_host_cpu_features().flatten()

    return f"llvmlite {llvmlite.__version__} LLVM {version} {b.get_host_cpu_name()} {features}"


class MachineCode:
    """Functions of an object file, loaded into this process."""

    def __init__(self, code: bytes) -> None:
        b = binding()
        self._engine = b.create_mcjit_compiler(b.parse_assembly(""), host_machine())
        self._engine.add_object_file(b.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        return self._engine.get_function_address(name)
