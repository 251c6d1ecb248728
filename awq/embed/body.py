"""A transformers model on a CPU whose own call runs through the compiled program.

For hosts that call `model(**tokens).last_hidden_state` themselves. Whatever else a call asks for,
it gets from the model's own forward: gradients, attention weights, states of all layers, embeddings
instead of ids, padding on the left, hooks inside of the model.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from awq.embed.compiled import CompiledEncoder, CompiledState
from awq.embed.proof import COMPILING, try_to_compile

INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def speed_up(model: nn.Module) -> None:
    """Lets the model's call run through the compiled program where that gives the same.

    The program is made at the first call that it could serve. It holds weights of its own: change
    none afterwards. Copies and pickles of the model have its plain forward.
    """
    model.forward = CompiledForward(model)  # type: ignore[assignment,method-assign]


def plain_forward(model: nn.Module) -> Any:
    """The forward of the model's class, bound to it."""
    return types.MethodType(type(model).forward, model)


class _Request(NamedTuple):
    """What a call gives the program. seen: bool [texts, tokens], where no padding is."""

    rows: list[list[int]]
    types: list[list[int]] | None
    seen: Tensor

    def is_for(self, program: CompiledEncoder) -> bool:
        """Whether ids and types are ones that the program takes."""
        plan = program.plan
        if not _are_below(len(plan.words), self.rows):
            return False

        if self.types is not None and plan.types is not None:
            if not _are_below(len(plan.types), self.types):
                return False

        return program.takes(self.rows)


def _are_below(end: int, rows: list[list[int]]) -> bool:
    """Whether all numbers are 0 or more, and less than that."""
    least = min(map(min, rows))
    most = max(map(max, rows))
    return least >= 0 and most < end


def _asks_for_states_alone(inputs: dict[str, Any]) -> bool:
    others = {name for name, value in inputs.items() if value is not None} - INPUTS
    return others <= {"return_dict"} and inputs.get("return_dict") is not False


def _request(input_ids: Any, attention_mask: Any, token_type_ids: Any) -> _Request | None:
    """None where ids are not [texts, tokens] on a CPU, padded on the right."""
    ids = input_ids
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        return None

    for other in (ids, attention_mask, token_type_ids):
        if other is None:
            continue
        if other.shape != ids.shape or other.device.type != "cpu":
            return None

    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    lengths = (mask != 0).sum(1, keepdim=True)
    seen = torch.arange(ids.shape[1]) < lengths
    is_padded_right = torch.equal(mask.long(), seen.long())
    if not is_padded_right or not lengths.all():
        return None

    def rows(values: Tensor) -> list[list[int]]:
        counts = lengths.flatten().tolist()
        return [row[:count] for row, count in zip(values.tolist(), counts)]

    types_ = None if token_type_ids is None else rows(token_type_ids)
    return _Request(rows(ids), types_, seen)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook waits for the module's call. transformers leaves hooks of its own
    behind, which act only where more than the last state is asked for."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not getattr(h, "__module__", "").startswith("transformers.") for h in hooks)


class CompiledForward:
    """Stands in for a model's `forward`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._plain = plain_forward(model)
        functools.update_wrapper(self, self._plain)  # its signature is asked for
        self._dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        self._modules = list(model.modules())[1:]
        self._program: CompiledEncoder | None = None
        self.state: CompiledState | None = None  # None: not tried yet

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = None if args else self._request(kwargs)
        if request is None:
            return self._plain(*args, **kwargs)

        program = self._made()
        if program is None or not request.is_for(program):
            return self._plain(*args, **kwargs)

        found = program.hidden_states(request.rows, request.types)
        texts, tokens = request.seen.shape
        hidden = torch.zeros(texts, tokens, found.shape[-1], dtype=torch.float32)
        hidden[request.seen] = found

        return self._output(hidden.to(dtype=self._dtype))

    def _request(self, inputs: dict[str, Any]) -> _Request | None:
        """None where the program cannot serve the call."""
        if not _asks_for_states_alone(inputs):
            return None
        if not self._is_for_reading():
            return None

        ids = inputs.get("input_ids")
        mask = inputs.get("attention_mask")

        return _request(ids, mask, inputs.get("token_type_ids"))

    def _is_for_reading(self) -> bool:
        """No gradient is wanted, the weights are where they were, and nobody looks inside."""
        if torch.is_grad_enabled() or self._model.training:
            return False
        on_cpu = next(self._model.parameters()).device.type == "cpu"
        return on_cpu and not any(map(_is_watched, self._modules))

    def _made(self) -> CompiledEncoder | None:
        if self.state is None:
            with COMPILING:
                if self.state is None:
                    self._compile()
        return self._program

    def _compile(self) -> None:
        model = self._model
        # Reading and proving call the model itself.
        model.forward = self._plain  # type: ignore[method-assign]
        precision = "float32" if self._dtype == torch.float32 else "exact"
        try:
            self._program, self.state = try_to_compile("model", model, ("mean",), False, precision)
        finally:
            model.forward = self  # type: ignore[assignment,method-assign]

    def _output(self, hidden: Tensor) -> Any:
        assert self._program is not None
        if self._program.spec.causal:
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        pooler = getattr(self._model, "pooler", None)
        pooled = None if pooler is None else pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model))
        return self if copied is None else plain_forward(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_forward, (self._model,)
