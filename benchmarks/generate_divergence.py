"""Fused generation beside transformers' own loop on the unfused, quantized model: greedy tokens,
and where they part.

    python benchmarks/generate_divergence.py --model DIR --families llama gemma2 --json out.json

On a GPU families that are not fused run captured. In float32 all tokens must be equal. In float16
they may part where two tokens' logits are closer than float16 can tell. A divergence is explained
when, in float32 on the same quantized weights, the two candidates are no further apart than the
errors of both paths there (largest over the vocabulary, added), *and* this path's errors up to
there are no larger than twice transformers' own (root mean squares): the first alone would be true
of any wrong path. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

from awq import AutoAWQForCausalLM
from awq.core.weight import round_to_nearest
from awq.models.base import BaseAWQForCausalLM
from awq.nn.linear import WQLinear
from awq.nn.surgery import get_weight, named_linears, replace_module

# before benchmarks/zoo.py, which is another one
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import zoo

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi", "gpt_neox", "gpt2", "cohere", "olmo2"]
MIXTURES = {"mixtral": dict(num_key_value_heads=2, num_local_experts=4)}
_LARGER = 2.0  # how much larger the fused path's error may be


def quantized(model: Any) -> Any:
    """Its linears but the head rounded to nearest, 4 bits, groups of 64 or 32 or whole rows."""
    for name, linear in named_linears(model).items():
        if linear is not model.get_output_embeddings():
            weight = get_weight(linear)
            size = next((s for s in (64, 32) if weight.shape[1] % s == 0), weight.shape[1])
            packed = WQLinear.from_quantized(
                round_to_nearest(weight.float(), size), getattr(linear, "bias", None)
            )
            replace_module(model, name, packed)
    return model


def real(directory: str) -> Any:
    """The language model of a directory, quantized here when it is not yet; float32, on the CPU."""
    if (Path(directory) / "config.json").read_text(encoding="utf-8").count("quantization_config"):
        return AutoAWQForCausalLM.from_quantized(
            directory, fuse_layers=False, device="cpu", torch_dtype=torch.float32
        ).model
    return quantized(AutoAWQForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).model)


def tiny(family: str, new: int) -> Any:
    names = dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), new + 32)
    return quantized(zoo.build(family, (zoo.DECODERS | MIXTURES)[family] | names))


def prompts(rows: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Left-padded, of different lengths."""
    ids = torch.randint(3, vocabulary - 1, (rows, 9), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 8, 1)[:rows]):
        mask[row, :padding] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def compare(
    name: str, model: Any, device: str, dtype: torch.dtype, rows: int, new: int
) -> list[dict[str, Any]]:
    """One entry per row of the batch. model: float32, on the CPU; it is left as it is."""
    reference, unfused, wrapper = (
        copy.deepcopy(model).to(device),
        copy.deepcopy(model).to(device, dtype),
        BaseAWQForCausalLM(copy.deepcopy(model).to(device, dtype), name),
    )
    wrapper.fuse_layers(16 + new, rows)
    batch = prompts(rows, model.config.get_text_config().vocab_size, device)
    kwargs = dict(
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    theirs, ours = (m.generate(**batch, **kwargs) for m in (unfused, wrapper))
    width, found = batch["input_ids"].shape[1], []
    for row in range(rows):
        a, b = theirs.sequences[row, width:].tolist(), ours.sequences[row, width:].tolist()
        first = next((i for i, (s, t) in enumerate(zip(a, b)) if s != t), None)
        upto = new if first is None else first + 1
        seen = batch["attention_mask"][row].bool()
        whole = torch.cat(
            [batch["input_ids"][row][seen], theirs.sequences[row, width : width + upto - 1]]
        )
        exact = reference(input_ids=whole.unsqueeze(0)).logits[0, -upto:].double()
        errors = [
            (torch.stack([x[row] for x in g.logits[:upto]]).double() - exact)
            for g in (theirs, ours)
        ]
        entry: dict[str, Any] = {
            "model": name,
            "batch": rows,
            "row": row,
            "fusion": str(wrapper.fusion),
            "new_tokens": new,
        }
        entry |= {"equal": new if first is None else first, "first_divergence": first}
        rms = [float(e.square().mean().sqrt()) for e in errors]
        entry |= {"rms_error_unfused": rms[0], "rms_error_fused": rms[1]}
        if first is not None:
            gap = float((exact[-1, a[first]] - exact[-1, b[first]]).abs())
            noise = sum(float(e[-1].abs().max()) for e in errors)
            explained = dtype != torch.float32 and gap <= noise and rms[1] <= _LARGER * rms[0]
            entry |= {
                "tokens": [a[first], b[first]],
                "gap": gap,
                "noise": noise,
                "explained_by_tie": explained,
            }
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="*", default=[], help="directories of language models, quantized or not"
    )
    parser.add_argument("--families", nargs="*", default=FAMILIES, help="of tests/zoo.py, random")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--commit", help="of the code, where git does not tell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name = arguments.dtype or ("float16" if arguments.device.startswith("cuda") else "float32")
    cases = [(Path(d).name, lambda d=d: real(d)) for d in arguments.model]
    cases += [(f"{f}, random", lambda f=f: tiny(f, arguments.new)) for f in arguments.families]
    rows: list[dict[str, Any]] = []
    for title, make in cases:
        model = make()
        for batch in arguments.batches:
            found = compare(
                title, model, arguments.device, getattr(torch, name), batch, arguments.new
            )
            rows += found
            print(*found, sep="\n", flush=True)
    parted = [r for r in rows if r["first_divergence"] is not None]
    # else both are transformers' loop
    own = [r for r in rows if r["fusion"] == "fused" or r["fusion"].startswith("captured")]
    bad = [
        r
        for r in rows
        if r["first_divergence"] is not None and not r["explained_by_tie"] or r not in own
    ]
    summary = {
        "dtype": name,
        "sequences": len(rows),
        "parted": len(parted),
        "not_explained": len(bad),
    }
    print(summary)
    if arguments.json:
        head = {"commit": arguments.commit} if arguments.commit else {}
        common.write(arguments.json, arguments.device, head | summary | {"rows": rows})
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
