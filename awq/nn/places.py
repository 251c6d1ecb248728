"""Where a model's tensors lie, for CUDA graphs: a graph reads addresses, whatever becomes of the
model."""

from __future__ import annotations

from torch import Tensor, nn


class Places:
    """The tensors of a model at one moment. They are kept: whoever gives the model others, as a
    change of layout or a cast does, takes no memory from a graph that is running, and nothing else
    can come to lie at their addresses."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [tensor.detach() for tensor in _tensors(model)]
        self._addresses = [tensor.data_ptr() for tensor in self._kept]

    def are_of(self, model: nn.Module) -> bool:
        """Whether the model's tensors still lie there. Takes some 100 µs for a large one."""
        return [tensor.data_ptr() for tensor in _tensors(model)] == self._addresses


def _tensors(root: nn.Module) -> list[Tensor]:
    """Parameters and buffers; `nn.Module.parameters` takes ten times as long."""
    found, modules = [], [root]
    while modules:
        module = modules.pop()
        found += [
            t
            for tensors in (module._parameters, module._buffers)
            for t in list(tensors.values())
            if t is not None
        ]
        modules += [m for m in list(module._modules.values()) if m is not None]
    return found
