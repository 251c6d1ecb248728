"""The proof of a compiled encoder: it must give what transformers' forward gives."""

from __future__ import annotations

import logging
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.embed.compiled import CompiledEncoder, CompiledState
from awq.embed.observe import NotReadable
from awq.embed.structure import EncoderPlan, read_encoder
from awq.nn.linear import WQLinear

PROOF_LENGTHS = (1, 7, 16, 33, 70)
MAX_PROVEN_WINDOW = 256  # wider ones would need long texts to prove
# Relative error of embeddings. What transformers rounds to 16 bits in every layer, the program
# keeps in float32.
PROOF_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PROOF_ERROR_OF_FLOATS = 1e-5
PROOF_ERROR_OF_BYTES = 0.12  # a cosine of 0.993 of the rarest texts, random words


COMPILED_POOLING = (("mean",), ("cls",), ("lasttoken",))
COMPILING = RLock()  # models are read and compiled one at a time

logger = logging.getLogger("awq.embed")


def try_to_compile(
    who: str,
    model: nn.Module,
    pooling: tuple[str, ...],
    normalize: bool,
    precision: str,
) -> tuple[CompiledEncoder | None, CompiledState]:
    """`compile_encoder`, or None and why torch goes on to run `who`."""
    try:
        if pooling not in COMPILED_POOLING:
            raise NotReadable(f"pooling of {', '.join(pooling)} is not compiled")
        program = compile_encoder(model, pooling[0], normalize, precision)
    except (NotReadable, ImportError) as error:
        reason = str(error)
    except Exception as error:  # any model may come; its own forward stays
        reason = f"reading it failed: {type(error).__name__} {error}"
    else:
        return program, CompiledState(True)

    logger.log(level_of_fallback(model), "The %s is not compiled, torch runs it: %s.", who, reason)
    return None, CompiledState(False, reason)


def level_of_fallback(model: nn.Module) -> int:
    """How loud it is that torch runs a model: only of a quantized one is anything else expected."""
    packed = any(isinstance(module, WQLinear) for module in model.modules())
    return logging.WARNING if packed else logging.DEBUG


def compile_encoder(
    model: Any,
    pooling: str,
    normalize: bool,
    precision: str = "exact",
) -> CompiledEncoder:
    """Reads, builds and proves. Raises NotReadable with the reason, ImportError without
    llvmlite."""
    compiled = CompiledEncoder(read_encoder(model), pooling, normalize, precision)
    prove(compiled, model)
    return compiled


@torch.no_grad()
def prove(compiled: CompiledEncoder, model: Any) -> float:
    """The largest relative error against transformers' forward. Raises NotReadable when it is more
    than rounding."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(compiled.plan.words)
    low = min(5, vocabulary - 1)
    rows = [
        torch.randint(low, vocabulary, (n,), generator=generator).tolist()
        for n in _proof_lengths(compiled.plan)
    ]
    together = compiled(rows)

    worst = 0.0
    for row, found in zip(rows, together):
        ids = torch.tensor([row])
        hidden = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()
        )
        expected = _pooled(hidden, compiled.spec.pooling)
        if compiled.spec.normalize:
            expected = F.normalize(expected, dim=-1)

        error = float((found - expected).norm() / expected.norm())
        worst = max(worst, error if error == error else float("inf"))

    allowed = PROOF_ERROR.get(compiled.plan.words.dtype, 1e-3)
    if compiled.spec.planes == 3 and compiled.plan.words.dtype == torch.float32:
        allowed = PROOF_ERROR_OF_FLOATS
    if compiled.spec.planes == 1:
        allowed = max(allowed, PROOF_ERROR_OF_BYTES)
    if worst > allowed:
        raise NotReadable(
            f"the compiled program differs from transformers' forward by {worst:.2g} (allowed: "
            f"{allowed:.2g})"
        )
    return worst


def _proof_lengths(plan: EncoderPlan) -> list[int]:
    """Tokens of the texts of a proof, one of them beyond every narrow window."""
    windows = [b.attention.window for b in plan.blocks]
    beyond = [
        2 * window + 9 for window in windows if window is not None and window <= MAX_PROVEN_WINDOW
    ]
    return sorted({min(length, plan.longest) for length in (*PROOF_LENGTHS, *beyond)})


def _pooled(hidden: Tensor, pooling: str) -> Tensor:
    return {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
