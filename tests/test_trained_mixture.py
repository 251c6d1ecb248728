"""A mixture that is really trained, so that its routing is skewed: what calibration does for the
experts that few tokens reach. `benchmarks/experts.py` measures the same on a larger model."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from awq.calibration import CalibrationBatch
from awq.config import AwqConfig
from awq.nn.hooks import listening
from awq.quantize import QuantizeOptions, quantize_model

pytest.importorskip(
    "transformers.integrations.moe",
    reason="transformers has no experts as 3-D parameters (before 5)",
)

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import experts as bench
from common import ROUND_TO_NEAREST

STEPS = 150
# Some tokens lie so near a tie of the router that any rounding sends them to other experts: ten of
# 8,192 can hold 96 % of the divergence that `balanced` leaves, by chance of the training.
ROUTED_ELSEWHERE = 0.005


@pytest.fixture(scope="module")
def trained():
    """(model, rows of text to calibrate on, held-out rows, the model's logits for those)."""
    rows, held_out = bench.rows_of_text()
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**bench.SIZES | {"num_hidden_layers": 2}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    picks = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = rows[torch.randint(len(rows), (bench.BATCH,), generator=picks)]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model, rows, held_out, bench.logits_of(model, held_out)


def quantized(trained, count, seed, rule="borrow", **options):
    """(the model quantized for so many rows of 64 bytes, the report)."""
    model, rows, *_ = trained
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    picked = rows[order[:count]]
    batches = [CalibrationBatch(picked, torch.ones_like(picked))]
    made = copy.deepcopy(model)
    with bench.rule(rule, bench.rules.WEIGHT_POWER):
        report = quantize_model(
            made, batches, AwqConfig(group_size=32), QuantizeOptions(**options, progress=False)
        )
    return made, report


def divergence(logits, dense):
    """KL divergence from dense, a mean without the most divergent `ROUTED_ELSEWHERE` of tokens."""
    of_each = F.kl_div(
        logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    kept = round(of_each.numel() * (1 - ROUTED_ELSEWHERE))
    return float(of_each.flatten().sort().values[:kept].mean())


def judged(trained, **options):
    """Loss and divergence from the dense model on held-out text; means of two choices of rows."""
    *_, held_out, dense = trained
    found = []
    for seed in (2, 3):
        made, _ = quantized(trained, 16, seed, **options)
        logits = bench.logits_of(made, held_out)
        loss = bench.judge(logits, dense, held_out)["loss"]
        found.append({"loss": loss, "kl": divergence(logits, dense)})
    return {name: sum(one[name] for one in found) / len(found) for name in ("loss", "kl")}


def test_balanced_is_below_fast_and_fast_below_nearest(trained):
    nearest = judged(trained, **ROUND_TO_NEAREST)
    fast = judged(trained, preset="fast")
    balanced = judged(trained)
    assert balanced["kl"] < 0.8 * fast["kl"] < 0.8 * 0.95 * nearest["kl"], (nearest, fast, balanced)
    assert balanced["loss"] < nearest["loss"]


@torch.no_grad()
def outputs_of(model, rows, numbers):
    """What experts `numbers` of the first layer give for every token of rows, routed there or
    not."""
    layer = model.model.layers[0]
    mixture = getattr(layer, "mlp", None) or layer.block_sparse_moe
    inputs = []
    with listening([mixture], before=lambda call: inputs.append(call.args[0])):
        model(rows)
    x = inputs[0].reshape(-1, inputs[0].shape[-1])
    if isinstance(mixture.experts, torch.nn.ModuleList):
        return torch.stack([mixture.experts[number](x) for number in numbers])
    index = torch.tensor(numbers).repeat(len(x), 1)
    ones = torch.ones(len(x), 1)
    return torch.stack([mixture.experts(x, index[:, i : i + 1], ones) for i in range(len(numbers))])


def test_an_expert_without_tokens_is_rounded_for_what_its_layer_reads(trained):
    model, _, held_out, _ = trained
    errors = {}
    for rule in ("borrow", "routed", "all"):
        made, report = quantized(trained, 1, 2, rule)
        tokens = next(iter(report.experts.values())).routed
        starved = [number for number, count in enumerate(tokens) if count == 0]
        assert starved
        expected = outputs_of(model, held_out, starved)
        found = outputs_of(made, held_out, starved)
        errors[rule] = float((found - expected).norm() / expected.norm())

    assert errors["borrow"] < 0.9 * errors["routed"], errors
    assert errors["borrow"] < 1.05 * errors["all"], errors
