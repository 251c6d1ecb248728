"""Products of float32 on a GPU's tensor cores (TF32), in the calling thread alone.

torch's switch for them (`set_float32_matmul_precision`) belongs to the process. Whoever serves a
float32 model in another thread would get other answers meanwhile, and keep them for good in the
CUDA graphs that it records. A dispatch mode belongs to a thread: `TensorCores` takes the large
products there and hands them to cuBLAS by a handle of its own. Operands keep 10 bits behind the
point, sums are float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MIN_WORK = (
    1 << 22
)  # multiplications from which a product is taken; smaller ones torch starts sooner
_TF32 = 3  # CUBLAS_TF32_TENSOR_OP_MATH
_handles = local()
_aten = torch.ops.aten
# What inference mode hands on without taking it apart.
_COMPOSED = (_aten.linear.default, _aten.matmul.default)


@cache
def _library() -> Any:
    """The cuBLAS that torch has loaded, or None."""
    version = torch.version.cuda
    if version is None:
        return None

    try:
        library = ctypes.CDLL(f"libcublas.so.{version.split('.')[0]}")
        product = library.cublasSgemmStridedBatched
    except (OSError, AttributeError):
        return None

    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    scalar = ctypes.POINTER(ctypes.c_float)
    matrix: list[Any] = [pointer, number, long]
    sizes: list[Any] = [number] * 5
    product.argtypes = [pointer, *sizes, scalar, *matrix, *matrix, scalar, *matrix, number]
    library.cublasCreate_v2.argtypes = [ctypes.POINTER(pointer)]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetMathMode.argtypes = [pointer, number]

    return library


def is_there(device: torch.device) -> bool:
    """Whether `TensorCores` can take products on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return _library() is not None


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLAS ends with status {status}.")


def _handle(device: torch.device) -> ctypes.c_void_p:
    """This thread's handle, for the current stream."""
    library = _library()
    known: dict[Any, ctypes.c_void_p] = _handles.__dict__
    if device.index not in known:
        made = ctypes.c_void_p()
        _check(library.cublasCreate_v2(ctypes.byref(made)))
        _check(library.cublasSetMathMode(made, _TF32))
        known[device.index] = made

    stream = torch._C._cuda_getCurrentRawStream(device.index)
    _check(library.cublasSetStream_v2(known[device.index], stream))

    return known[device.index]


def _operand(matrices: Tensor) -> tuple[Tensor, int, int]:
    """(the tensor to read, cuBLAS's transposition, its leading dimension) of [batch, m, n], of
    which cuBLAS, whose matrices are stored by columns, takes the transpose."""
    _, rows, columns = matrices.shape
    _, down, across = matrices.stride()
    if across == 1 and down >= columns:
        return matrices, 0, down
    if down == 1 and across >= rows:
        return matrices, 1, across
    return matrices.contiguous(), 0, columns


def add_product(c: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    """c = alpha · a · b + beta · c, in place, for float32 c [batch, m, n], a [batch, m, k] and b
    [batch, k, n] on one GPU. c: rows of it lie in one piece."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    a, turn_a, step_a = _operand(a)
    b, turn_b, step_b = _operand(b)

    with torch.cuda.device(c.device):
        status = _library().cublasSgemmStridedBatched(
            _handle(c.device),
            turn_b,
            turn_a,
            columns,
            rows,
            depth,
            ctypes.byref(ctypes.c_float(alpha)),
            b.data_ptr(),
            step_b,
            b.stride(0),
            a.data_ptr(),
            step_a,
            a.stride(0),
            ctypes.byref(ctypes.c_float(beta)),
            c.data_ptr(),
            c.stride(1),
            c.stride(0),
            batch,
        )

    _check(status)


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 [batch, m, n] of [batch, m, k] and [batch, k, n]."""
    c = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    add_product(c, a, b)
    return c


class TensorCores(TorchDispatchMode):
    """Inside, this thread's large float32 products on GPUs are TF32; all else is torch's."""

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _COMPOSED:
            with self:
                return function.decompose(*args, **kwargs)

        taken = _PRODUCTS.get(function)
        if taken is not None and not kwargs.keys() - {"alpha", "beta"} and _is_large(*args[-2:]):
            return taken(*args, **kwargs)
        return function(*args, **kwargs)


def _is_large(a: Tensor, b: Tensor) -> bool:
    """Whether a product of two matrices, or of two stacks of them, is worth a call."""
    if not all(t.is_cuda and t.dtype == torch.float32 for t in (a, b)):
        return False
    return a.numel() * b.shape[-1] >= MIN_WORK


def _matrices(a: Tensor, b: Tensor) -> Tensor:
    return product(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


def _added(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def added(given: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        found = multiply(a, b)
        if alpha != 1:
            found.mul_(alpha)
        return found.add_(given, alpha=beta) if beta != 0 else found

    return added


def _added_in_place(
    given: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Tensor:
    whole, a, b = (t if t.dim() == 3 else t.unsqueeze(0) for t in (given, a, b))
    if whole.stride(2) == 1 and whole.stride(1) >= whole.shape[2]:
        add_product(whole, a, b, float(alpha), float(beta))
        return given

    found = product(a, b).view(given.shape)
    return given.mul_(beta).add_(found, alpha=alpha)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _matrices,
    _aten.bmm.default: product,
    _aten.addmm.default: _added(_matrices),
    _aten.addmm_.default: _added_in_place,
    _aten.baddbmm.default: _added(product),
    _aten.baddbmm_.default: _added_in_place,
}
