"""Large float32 products of one thread in TF32: what cuBLAS is asked for, on a stand-in that
computes by its rules of storage, and on a GPU beside other threads."""

import contextlib
import ctypes
import threading

import numpy as np
import pytest
import torch

from awq.kernels import tf32


def floats(address, count):
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


class StandIn:
    """`cublasSgemmStridedBatched` in numpy: matrices are stored by columns, a leading dimension
    apart."""

    calls = 0

    def cublasSgemmStridedBatched(self, _handle, turn_a, turn_b, m, n, k, alpha, *operands):
        a, lda, step_a, b, ldb, step_b, beta, c, ldc, step_c, batch = operands
        shape_a, shape_b = ((k, m) if turn_a else (m, k)), ((n, k) if turn_b else (k, n))
        assert lda >= shape_a[0] and ldb >= shape_b[0] and ldc >= m
        for i in range(batch):
            x = self.matrix(a + 4 * i * step_a, lda, shape_a)
            y = self.matrix(b + 4 * i * step_b, ldb, shape_b)
            x, y = x.T if turn_a else x, y.T if turn_b else y
            z = self.matrix(c + 4 * i * step_c, ldc, (m, n))
            before = beta._obj.value * z if beta._obj.value else 0
            z[:] = alpha._obj.value * (x @ y) + before
        StandIn.calls += 1
        return 0

    @staticmethod
    def matrix(address, leading, shape):
        memory = floats(address, leading * (shape[1] - 1) + shape[0])
        return np.lib.stride_tricks.as_strided(memory, shape, (4, 4 * leading))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(tf32, "_library", StandIn)
    monkeypatch.setattr(tf32, "_handle", lambda _device: None)
    monkeypatch.setattr(tf32, "_is_large", lambda a, b: a.dtype == b.dtype == torch.float32)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    StandIn.calls = 0


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


X, W, BIG = numbers(5, 6), numbers(4, 6), numbers(9, 11)
PRODUCTS = {
    "linear": lambda: torch.nn.functional.linear(X, W, numbers(4)),
    "linear of three axes": lambda: torch.nn.functional.linear(X.view(1, 5, 6), W),
    "both by rows": lambda: X @ W.t().contiguous(),
    "the second by columns": lambda: X @ W.t(),
    "the first by columns": lambda: X.t().contiguous().t() @ W.t().contiguous(),
    "both by columns": lambda: X.t().contiguous().t() @ W.t(),
    "parts of a matrix": lambda: BIG[1:6, 2:8] @ BIG[2:8, 3:7],
    "every second row and third column": lambda: BIG[::2, ::3] @ numbers(4, 3),
    "one row for all": lambda: BIG[:1].expand(4, 11) @ numbers(11, 3),
    "one column": lambda: X @ numbers(6, 1),
    "one row": lambda: X[:1] @ W.t(),
    "one product": lambda: X[:, :1] @ numbers(1, 3),
    "added": lambda: torch.addmm(numbers(4)[:, None].expand(4, 5), W, X.t(), beta=3, alpha=2),
    "added in place": lambda: numbers(4, 5).addmm_(W, X.t(), alpha=-2, beta=0.5),
    "added to a part": lambda: numbers(7, 9)[2:6, 1:6].addmm_(W, X.t(), alpha=3),
    "added to columns": lambda: numbers(5, 4).t().addmm_(W, X.t(), alpha=3),
    "stacks": lambda: numbers(3, 4, 5) @ numbers(3, 5, 2),
    "stacks of one": lambda: BIG.view(1, 9, 11).expand(3, 9, 11) @ numbers(3, 11, 2),
    "stacks in the middle": lambda: numbers(4, 3, 5).transpose(0, 1) @ numbers(3, 5, 2),
    "stacks added": lambda: torch.baddbmm(
        numbers(2, 3, 4), numbers(2, 3, 5), numbers(2, 5, 4), beta=0.5
    ),
    "stacks in place": lambda: numbers(2, 3, 4).baddbmm_(numbers(2, 3, 5), numbers(2, 5, 4)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_products_are_torchs(stand_in, kind, mode):
    expected = PRODUCTS[kind]()
    with mode(), tf32.TensorCores():
        found = PRODUCTS[kind]()
    assert StandIn.calls == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_go_there_too(stand_in):
    found = []
    for mode in (contextlib.nullcontext(), tf32.TensorCores()):
        weight = W.clone().requires_grad_()
        with mode:
            (X @ weight.t()).square().sum().backward()
        found.append(weight.grad)
    assert StandIn.calls >= 2
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_other_threads_and_dtypes_stay_torchs(stand_in):
    with tf32.TensorCores():
        other = threading.Thread(target=lambda: X @ W.t())
        other.start()
        other.join()
        assert torch.equal(X.double() @ W.t().double(), X.double() @ W.t().double())
    assert StandIn.calls == 0
    assert not tf32.is_there(torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_beside_another_thread():
    device = torch.device("cuda", torch.cuda.current_device())
    assert tf32.is_there(device), "every GPU that Triton serves has tensor cores for float32"
    a, b = numbers(600, 512).to(device), numbers(512, 700).to(device)
    exact = a.double() @ b.double()
    plain = a @ b
    with tf32.TensorCores():
        found = a @ b
        beside = []
        other = threading.Thread(target=lambda: beside.append(a @ b))
        other.start()
        other.join()
    error = float((found - exact).norm() / exact.norm())
    assert 1e-5 < error < 1e-3, "operands keep ten bits"
    assert torch.equal(beside[0], plain)
    assert torch.get_float32_matmul_precision() == "highest"
