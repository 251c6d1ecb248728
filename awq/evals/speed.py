"""Speed and memory of generation, as users of AutoAWQ know the table: prefill tok/s, decode tok/s,
memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from awq.nn.linear import WQLinear
from awq.nn.packed_experts import ExpertStack


@dataclass
class Speed:
    """One line of the table.

    prefill_tok_s: prompt tokens of all rows over the time to the first new token. decode_tok_s: new
    tokens of all rows after the first, over the time after it. first_s: the first call, whatever
    had to be compiled and built included. peak_gb: peak memory in 10^9 bytes, of the GPU, or of the
    process on a CPU (loading included). Times are medians over repeats, of greedy calls of
    `generate`.
    """

    batch: int
    prompt: int
    new: int
    prefill_tok_s: float
    decode_tok_s: float
    first_s: float
    peak_gb: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generation_speed(
    model: Any,
    batch: int = 1,
    prompt: int = 64,
    new: int = 64,
    repeats: int = 3,
    **kwargs: Any,
) -> Speed:
    """Times `model.generate` on prompts of random tokens. kwargs are passed on to it. new: at least
    2."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(
        min(3, vocabulary - 1),
        vocabulary,
        (batch, prompt),
        generator=torch.Generator().manual_seed(1),
    )
    ids = ids.to(model.device)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()

    first = seconds(model, ids, 2, **kwargs)
    for _ in range(2):
        seconds(model, ids, 2, **kwargs)
    prefill = statistics.median(seconds(model, ids, 1, **kwargs) for _ in range(max(3, repeats)))
    whole = statistics.median(seconds(model, ids, new, **kwargs) for _ in range(repeats))
    peak = (torch.cuda.max_memory_allocated() if ids.is_cuda else _process_peak()) / 1e9

    return Speed(
        batch,
        prompt,
        new,
        batch * prompt / prefill,
        batch * (new - 1) / (whole - prefill),
        first,
        peak,
    )


def seconds(model: Any, ids: Tensor, new: int, **kwargs: Any) -> float:
    """Wall time of one greedy call of `generate` for exactly `new` tokens."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    ends = {"eos_token_id": None, "pad_token_id": 0}
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        **ends,
        **kwargs,
    )
    if ids.is_cuda:
        torch.cuda.synchronize()

    return time.perf_counter() - start


def weight_bytes(model: Any) -> int:
    """Bytes that a decode step reads of a model: all its parameters and packed weights but the
    embedding table, unless that is the head too."""
    tensors = list(model.parameters())
    for module in model.modules():
        if isinstance(module, (WQLinear, ExpertStack)):
            tensors += module.buffers()

    head = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    is_head = head is not None and getattr(head, "weight", None) is table
    if not is_head:
        tensors = [tensor for tensor in tensors if tensor is not table]

    # what stands under two names is read once
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(sizes.values())


def read_bandwidth(device: torch.device | str, size: int = 1 << 29) -> float:
    """Bytes per second at which a device reads its memory: the best of several sums over `size`
    bytes, on torch's threads."""
    values = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(10):
        if values.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        values.sum().item()
        best = max(best, size / (time.perf_counter() - start))

    return best


def _process_peak() -> float:
    """Bytes; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def as_table(name: str, version: str, rows: Sequence[Speed]) -> str:
    """Markdown, with the columns that AutoAWQ's users know."""
    lines = [
        "| model | version | batch | prefill length | decode length | prefill tok/s | decode "
        "tok/s | memory GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        speeds = f"{r.prefill_tok_s:,.0f} | {r.decode_tok_s:,.1f}"
        lines.append(
            f"| {name} | {version} | {r.batch} | {r.prompt} | {r.new} | {speeds} | "
            f"{r.peak_gb:.2f} |"
        )
    return "\n".join(lines)
