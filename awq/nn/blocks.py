"""Finding a model's repeated blocks and running them one at a time.

A transformers model calls each block with its own arguments (masks, rotary tables: some models give
every layer different ones). They are recorded in a *skeleton pass*: every block is replaced by a
stub that notes its arguments and hands its hidden states on unchanged, so recording costs an
embedding lookup, not a forward.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ModelError
from awq.nn.hooks import Call, hooked, listening
from awq.nn.linear import WQLinear
from awq.nn.surgery import is_linear

logger = logging.getLogger("awq.nn")

CACHES = ("past_key_values", "past_key_value", "layer_past", "past", "cache", "cache_params")
_FLAGS = {"use_cache": False, "output_attentions": False}

# [rows, tokens]; a decoder's, too
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_SAME = 0.01  # relative, of hidden states in any dtype
_SHORT_TOKENS = 16  # of a true pass that only shows what runs, and what it returns


class OneBlock(list):
    """One block of a list, whose inputs are recorded by themselves: it does not read just what the
    block before it gives. first: its place in the list."""

    def __init__(self, block: nn.Module, first: int) -> None:
        super().__init__([block])
        self.first = first


BlockList = tuple[str, "nn.ModuleList | OneBlock"]


def block_names(entry: BlockList) -> list[str]:
    """Full names of the blocks of a list."""
    prefix, blocks = entry
    first = blocks.first if isinstance(blocks, OneBlock) else 0
    return [f"{prefix}.{first + i}" for i in range(len(blocks))]


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a module's output: the tensor itself or what comes first in a tuple (of
    tuples, as LiLT's layers gave before transformers 5)."""
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output


def find_block_lists(model: nn.Module) -> list[BlockList]:
    """(name, blocks) of the outermost module lists whose elements contain linears, in registration
    order.

    Raises ModelError when the model has none.
    """
    found: list[BlockList] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if (
            not inside
            and isinstance(module, nn.ModuleList)
            and len(module)
            and all(map(_has_products, module))
            and not all(isinstance(member, nn.ModuleList) for member in module)  # lists of lists
        ):
            found.append((name, module))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of repeated blocks with linear layers; nothing "
            "to quantize."
        )
    return found


@torch.no_grad()
def reached_lists(
    model: nn.Module, lists: Sequence[BlockList], item: dict[str, Tensor]
) -> list[BlockList]:
    """The lists whose blocks all run when the model is called with `item`, in the order in which
    they begin.

    A vision tower does not run on text. An encoder begins before its decoder, wherever it is
    registered. A list whose blocks do not read just what the block before them gives comes as
    single blocks. Raises ModelError when the model's forward fails.
    """
    short = _short(item)
    names = [name for entry in lists for name in block_names(entry)]
    seen = _observed(model, names, short)
    order = {name: place for place, name in enumerate(seen)}
    reached: list[BlockList] = []
    for entry in lists:
        own = block_names(entry)
        if not all(name in seen for name in own):
            continue
        prefix, blocks = entry
        if len(blocks) < 2 or _is_chain(model, entry, short, [seen[name] for name in own]):
            reached.append(entry)
        else:
            reached += [(prefix, OneBlock(block, i)) for i, block in enumerate(blocks)]
    return sorted(reached, key=lambda entry: order[block_names(entry)[0]])


@dataclass
class _Observed:
    """A block's first call in a true pass: its input, other arguments and output; how many calls
    there were."""

    hidden: Tensor
    call: BlockCall
    output: Any = None
    calls: int = 1


def _observed(
    model: nn.Module, names: Sequence[str], item: dict[str, Tensor]
) -> dict[str, _Observed]:
    """Name → what was seen of a block that runs, in the order of first calls."""
    seen: dict[str, _Observed] = {}

    def before(name: str, call: Call) -> None:
        if name in seen:
            seen[name].calls += 1
        else:
            hidden, others = split_call(call.args, call.kwargs)
            seen[name] = _Observed(hidden.clone(), others)

    def after(name: str, call: Call) -> None:
        first = seen[name]
        if first.output is None:
            first.output = map_tensors(hidden_of(call.output), torch.clone)

    with ExitStack() as stack:
        for name in names:  # two names may mean the same module
            block = model.get_submodule(name)
            stack.enter_context(listening([block], partial(before, name), partial(after, name)))
        run_body(model, item)
    return seen


def _is_chain(
    model: nn.Module, entry: BlockList, item: dict[str, Tensor], seen: Sequence[_Observed]
) -> bool:
    """Whether each block reads what the one before it gives, and a skeleton pass knows its other
    arguments.

    Some models put other layers between their blocks (XLM), or hand more than hidden states on from
    block to block (LiLT, Pegasus-X). Blocks that run several times are not asked.
    """
    if seen[0].hidden.is_meta or any(block.calls > 1 for block in seen):
        return True
    try:
        recorded = record_block_calls(model, [entry], [item]).calls[0][0]
        for i, (block, call, true) in enumerate(zip(entry[1], recorded, seen)):
            if i and not _close(true.hidden, seen[i - 1].output):
                return False
            if not _alike(call, true.call):
                return False
            call.run(block, true.hidden)  # may lack what an earlier block would give
        return True
    except Exception as error:  # of anybody's block, called without what it needs
        logger.info("%s: its blocks run one by one: %s", entry[0], error)
        return False


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return float((a - b).float().norm()) <= _SAME * float(b.float().norm())


def _alike(call: BlockCall, true: BlockCall) -> bool:
    """Whether all floating tensors that the true call is given are the same in the other."""
    pairs = list(zip(call.args, true.args))
    for key, value in call.kwargs.items():
        pairs.append((value, true.kwargs.get(key)))
    for given, wanted in pairs:
        if not _is_floating(wanted):
            continue
        if not _is_floating(given):
            return False  # made by an earlier block, as T5's first one makes the bias of all
        # masks hold infinities
        if not _close(given.nan_to_num(), wanted.nan_to_num()):
            return False
    return True


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_products(block: nn.Module) -> bool:
    """Whether linears lie below a block; a list of linears is none of blocks."""
    return any(is_product(module) for module in block.modules() if module is not block)


def is_product(module: nn.Module) -> bool:
    """Whether a module is a linear, dense or packed."""
    return is_linear(module) or isinstance(module, WQLinear)


def float_copy(block: nn.Module) -> nn.Module:
    """A float32 copy of a block to experiment on."""
    return copy.deepcopy(block).float().eval()


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Applies `change` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(v, change) for v in value]
        return type(value)(mapped) if type(value) in (tuple, list) else type(value)(*mapped)
    if type(value) is dict:
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


@dataclass
class BlockCall:
    """Arguments of one call of one block without its hidden states.

    where: key of the hidden states among the keyword arguments; None when they are the first
    positional argument.
    """

    args: tuple
    kwargs: dict[str, Any]
    where: str | None = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's new hidden states for `hidden` [batch, tokens, features]."""
        return hidden_of(self.outputs(block, hidden))

    def outputs(self, block: nn.Module, hidden: Tensor) -> Any:
        """All that the block gives."""
        if self.where is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.where: hidden, **self.kwargs})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> BlockCall:
        """The same call with tensors on `device`, floating ones as `dtype`."""

        def move(t: Tensor) -> Tensor:
            return (
                t.to(device, dtype) if dtype is not None and t.is_floating_point() else t.to(device)
            )

        return BlockCall(map_tensors(self.args, move), map_tensors(self.kwargs, move), self.where)


@dataclass
class BlockCalls:
    """calls[list][input][block] and hidden[list][input]: what enters the first block of each
    list."""

    calls: list[list[list[BlockCall]]]
    hidden: list[list[Tensor]]


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Separates the hidden states [batch, tokens, features] from a block's other arguments, and
    drops caches."""
    kept = {
        key: value for key, value in kwargs.items() if key not in CACHES and not _is_cache(value)
    }
    kept |= {flag: value for flag, value in _FLAGS.items() if flag in kwargs}
    args = tuple(None if _is_cache(a) else a for a in args)
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(args[1:], kept)
    where = _key_of_hidden(kept)
    hidden = kept.pop(where)
    return hidden, BlockCall(args, kept, where)


def _key_of_hidden(kwargs: dict[str, Any]) -> str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(key for key, value in kwargs.items() if isinstance(value, Tensor))


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


@torch.no_grad()
def record_block_calls(
    model: nn.Module,
    lists: Sequence[BlockList],
    inputs: Sequence[dict[str, Tensor]],
    run: Callable[[nn.Module, dict[str, Tensor]], Any] | None = None,
) -> BlockCalls:
    """Records how the model calls every block for each input (keyword arguments of the model's
    forward).

    run: calls the model; default: its body, for the head is not needed.

    Raises ModelError when the model's own forward fails on an input, or never calls a block.
    """
    blocks = {
        (i, j): block for i, (_, members) in enumerate(lists) for j, block in enumerate(members)
    }
    wraps = _output_structures(model, lists, inputs[0])
    recorded: list[list[list[BlockCall]]] = [[] for _ in lists]
    entering: list[list[Tensor]] = [[] for _ in lists]
    for item in inputs:
        seen: dict[tuple[int, int], tuple[Tensor, BlockCall]] = {}
        stubs = {block: _stub(seen, key, wraps[key]) for key, block in blocks.items()}
        with replaced_forwards(stubs):
            (run or run_body)(model, item)
        for i, (name, members) in enumerate(lists):
            missing = [j for j in range(len(members)) if (i, j) not in seen]
            if missing:
                raise ModelError(
                    f"{name}.{missing[0]} is never called by the model's forward; it cannot be "
                    "calibrated."
                )
            entering[i].append(seen[i, 0][0].detach())
            recorded[i].append([seen[i, j][1] for j in range(len(members))])
    return BlockCalls(recorded, entering)


@torch.no_grad()
def record_one_block(
    model: nn.Module, name: str, inputs: Sequence[dict[str, Tensor]]
) -> tuple[list[BlockCall], list[Tensor]]:
    """(arguments, hidden states) of one block's first call for each input; all before it runs.

    Raises ModelError like `record_block_calls`.
    """
    calls, entering = [], []
    for item in inputs:
        seen: list[tuple[Tensor, BlockCall]] = []

        def note(*args: Any, **kwargs: Any) -> None:
            seen.append(split_call(args, kwargs))
            raise _Reached

        with replaced_forwards({model.get_submodule(name): note}), suppress(_Reached):
            run_body(model, item)
        if not seen:
            raise ModelError(f"{name} is never called by the model's forward; it stays unknown.")
        entering.append(seen[0][0].detach())
        calls.append(seen[0][1])
    return calls, entering


class _Reached(Exception):
    """Ends a forward whose rest is of no use."""


def _stub(seen: dict, key: tuple[int, int], wrap: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """A forward that notes its arguments in `seen` and hands the hidden states on."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, call = split_call(args, kwargs)
        seen[key] = hidden, call
        return wrap(hidden)

    return forward


def _output_structures(
    model: nn.Module, lists: Sequence[BlockList], item: dict[str, Tensor]
) -> dict[tuple[int, int], Callable[[Tensor], Any]]:
    """For every block, a function that puts hidden states into the structure of the block's own
    output.

    Learnt from one true pass over the beginning of one row.
    """
    keys = {
        f"{prefix}.{j}": (i, j)
        for i, (prefix, blocks) in enumerate(lists)
        for j in range(len(blocks))
    }
    wraps: dict[tuple[int, int], Callable[[Tensor], Any]] = dict.fromkeys(keys.values(), _as_it_is)

    def learn(name: str, output: Any) -> None:
        if isinstance(output, (tuple, list)):
            rest = (None,) * (len(output) - 1)
            wraps[keys[name]] = lambda hidden: (hidden, *rest)

    with hooked(model, keys, after=learn):
        run_body(model, _short(item))
    return wraps


def _short(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """The beginning of the first row of a model's inputs, without padding; all, where images or
    sound stand beside the tokens: their first axis counts patches, and ids stand for each."""
    if not all(name.endswith(_TOKEN_INPUTS) for name in item):
        return item
    short = {}
    for name, tensor in item.items():
        row = tensor[:1, :_SHORT_TOKENS]
        short[name] = torch.ones_like(row) if name.endswith("attention_mask") else row
    return short


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def run_body(model: nn.Module, item: dict[str, Tensor]) -> None:
    """Runs the model's body (its head is not needed) without a cache."""
    body = getattr(model, "base_model", model)
    try:
        body(**item, **no_cache(body))
    except (
        TypeError,
        ValueError,
        LookupError,
        RuntimeError,
        AttributeError,
        AssertionError,
    ) as error:
        shapes = {k: tuple(v.shape) for k, v in item.items()}
        raise ModelError(
            f"the model's forward fails on calibration inputs of shapes {shapes}: {error}"
        ) from error


def no_cache(model: nn.Module) -> dict[str, bool]:
    """What tells a model's forward to keep no cache; nothing where it knows none, as encoders."""
    if getattr(getattr(model, "config", None), "use_cache", None) is None:
        return {}
    taken = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    return {"use_cache": False} if open_ended or "use_cache" in taken else {}


@contextmanager
def replaced_forwards(replacements: dict[nn.Module, Any]) -> Iterator[None]:
    """Gives modules another `forward` for a while. One set on the instance before (accelerate's
    hooks) comes back."""
    own = {
        module: module.__dict__["forward"]
        for module in replacements
        if "forward" in module.__dict__
    }
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module in replacements:
            module.__dict__.pop("forward", None)
            if module in own:
                module.forward = own[module]
