"""Compiled encoders give what transformers' forward gives, for any texts and from any number of
threads, or say why not."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel
from zoo import available
from zoo import build as tiny

from awq.core.weight import round_to_nearest
from awq.embed import build
from awq.embed.compiled import CompiledEncoder
from awq.embed.encoder import Encoder
from awq.embed.heads import Normalize, Pooling
from awq.embed.observe import Event, NotReadable, norm_of
from awq.embed.proof import prove
from awq.embed.request import check_precision
from awq.embed.structure import read_encoder
from awq.errors import ConfigError
from awq.kernels.cpu import engine
from awq.kernels.cpu.encoder.program import emit_encoder
from awq.kernels.cpu.targets import TARGETS
from awq.native import runner
from awq.native.pool import usable_cores
from awq.nn.blocks import find_block_lists
from awq.nn.linear import WQLinear
from awq.nn.surgery import named_linears, replace_module

pytest.importorskip("llvmlite")

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    vocab_size=96,
    max_position_embeddings=300,
)
GROUPED = dict(num_key_value_heads=2, head_dim=32)
ROTARY = dict(hidden_act="silu", activation_function="silu", layer_norm_eps=1e-5)
BOTH_WAYS = dict(use_bidirectional_attention=True, sliding_window=16, query_pre_attn_scalar=32)
# Families of one structure share a program: that of bert serves roberta, xlm-roberta and
# distilbert, that of nomic_bert serves gte.
FAMILIES = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": dict(dim=64, n_heads=4, n_layers=2, hidden_dim=96),
    "mpnet": {},
    "modernbert": dict(local_attention=16, cls_token_id=1, sep_token_id=2),
    "nomic_bert": ROTARY | dict(head_dim=16),
    "gte": ROTARY,
    "qwen3": GROUPED,
    "mistral": GROUPED | dict(sliding_window=40),
    "gemma3_text": GROUPED | BOTH_WAYS,
}
KEPT = []
POOLING = {"modernbert": "cls", "qwen3": "lasttoken"}


def quantized(family, **settings):
    """The body of a tiny random model whose blocks are 4-bit linears, in groups of 32."""
    model = tiny(family, SIZES | FAMILIES.get(family, {}) | settings)
    body = model.base_model
    # in transformers 4.57 the base model of a Gemma 3 is the model itself
    return with_packed_blocks(getattr(model, "model", body) if body is model else body)


def with_packed_blocks(model):
    if hasattr(model, "set_attn_implementation"):  # not yet in transformers 4.51
        model.set_attn_implementation("sdpa")
    blocks = tuple(f"{name}." for name, _ in find_block_lists(model))
    for name, linear in named_linears(model).items():
        if name.startswith(blocks):
            weight = round_to_nearest(linear.weight.data, 32)
            bias = None if linear.bias is None else linear.bias.data
            replace_module(model, name, WQLinear.from_quantized(weight, bias))
    return model.float().eval()


def texts(lengths, vocabulary=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def expected(model, row, pooling="mean"):
    ids = torch.tensor([row])
    hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]


@pytest.fixture(scope="module")
def bert():
    model = quantized("bert")
    return model, CompiledEncoder(read_encoder(model), "mean", False)


def needs_visible_queries(model):
    """Older releases keep rotation and attention of ModernBERT in one function."""
    if not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("transformers has no ModernBERT in whose attention queries can be seen")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers(family):
    if not available(family):
        pytest.skip(f"transformers has no {family}")
    if family in ("mistral", "gemma3_text") and not hasattr(
        PreTrainedModel, "set_attn_implementation"
    ):
        pytest.skip(f"transformers has no {family} whose sliding windows a program could follow")
    model = quantized(family)
    if family == "modernbert":
        needs_visible_queries(model)
    pooling = POOLING.get(family, "mean")
    compiled = CompiledEncoder(read_encoder(model), pooling, normalize=pooling != "mean")
    assert prove(compiled, model) < 2e-4
    longest = compiled.plan.longest
    rows = texts((1, 2, 15, 16, 17, 130, longest))
    found = compiled(rows)
    for row, embedding in zip(rows, found):
        want = expected(model, row, pooling)
        if pooling != "mean":
            want = F.normalize(want, dim=0)
        assert (embedding - want).norm() < 2e-4 * want.norm()


def test_a_text_has_the_same_bits_alone_and_among_a_thousand(bert):
    _, compiled = bert
    rows = texts([1 + i % 23 for i in range(1000)])
    together = compiled(rows)
    for i in (0, 1, 7, 22, 500, 999):
        assert torch.equal(compiled([rows[i]])[0], together[i])


@pytest.mark.parametrize("helpers", [0, 1])
def test_callers_from_many_threads_get_the_same_bits(bert, helpers):
    _, compiled = bert
    rows = texts([3 + i for i in range(40)])
    alone = [compiled([row], helpers=0) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: compiled([row], helpers=helpers), rows))
    assert all(torch.equal(a, b) for a, b in zip(alone, found))


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_slices_hold_every_token_and_are_even(workers):
    for tokens in range(1, 700):
        size, is_sliced = runner.division(tokens, workers)
        if is_sliced:
            slices = -(-tokens // size)
            assert size <= runner.SLICE_TOKENS
            assert slices * size - tokens <= 2 * slices  # the last one has its part
            assert size <= -(-tokens // workers) + 1  # no worker has more than its part


@pytest.mark.parametrize("division", [(2, True), (6, True), (64, True), (64, False), (10, False)])
def test_the_way_that_work_is_divided_changes_no_bit(bert, division, monkeypatch):
    _, compiled = bert
    rows = texts((1, 15, 40, 130))
    want = compiled(rows, helpers=0)
    monkeypatch.setattr(runner, "division", lambda tokens, workers: division)
    for helpers in (0, 1):
        assert torch.equal(compiled(rows, helpers=helpers), want)


@pytest.mark.parametrize("tokens", [5, 16, 100])
def test_three_helpers_give_the_same_bits(bert, tokens, monkeypatch):
    """Also where there are fewer cores; the runner takes helpers and goes without them by turns."""
    _, compiled = bert
    monkeypatch.setattr(runner, "helpers_for_this_process", lambda: 3)
    program = runner._program.__wrapped__(compiled.runner.image.code)
    KEPT.append(program)  # its helpers live in its machine code as long as the process
    monkeypatch.setattr(runner, "_program", lambda code: program)
    helped = runner.Runner(compiled.runner.image)
    assert helped.helpers == 3
    rows = texts([tokens])
    want = compiled(rows, helpers=0).numpy()
    assert all((helped(rows, None, 0, 3) == want).all() for _ in range(40))


def test_activations_of_eight_bits_keep_the_direction(bert):
    model, exact = bert
    rows = texts((3, 16, 40))
    found = CompiledEncoder(read_encoder(model), "mean", False, "int8")(rows)
    want = exact(rows)
    errors = (found - want).norm(dim=1) / want.norm(dim=1)
    assert errors.max() < 1e-2
    assert errors.min() > 1e-4  # they are eight bits


def test_norms_of_16_bits_have_the_epsilon_that_they_name():
    """Rounding hides an epsilon, so the nearest one would differ from norm to norm."""
    plan = read_encoder(quantized("bert").bfloat16())
    norms = [norm for block in plan.blocks for norm in (block.attention_norm, block.mlp_norm)]
    assert {(norm.eps, norm.centered) for norm in norms} == {(1e-12, True)}


@pytest.mark.parametrize("kind, centered", [(torch.nn.LayerNorm, True), (torch.nn.RMSNorm, False)])
def test_norms_of_16_bits_are_told_apart_where_the_mean_is_near_zero(kind, centered):
    module = kind(64, eps=1e-6).bfloat16()
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 5, 64)
    x = (x - x.mean(-1, keepdim=True)).bfloat16()
    norm = norm_of(Event(module, x, module(x)))
    assert norm.centered == centered and norm.eps == 1e-6


def test_vectors_and_matrix_units_give_the_same(bert, monkeypatch):
    """On a CPU without a matrix unit both are the vectors'."""
    model, usual = bert
    monkeypatch.setattr(build.matrix_unit, "is_usable", lambda: False)
    vectors = CompiledEncoder(read_encoder(model), "mean", False)
    assert not vectors.spec.matrix_unit
    assert prove(vectors, model) < 2e-4
    rows = texts((1, 15, 17, 200))
    want = vectors(rows)
    assert (usual(rows) - want).norm() < 1e-5 * want.norm()


def test_machine_code_of_a_cpu_that_this_one_need_not_be(bert):
    _, compiled = bert
    spec = compiled.spec._replace(matrix_unit=True)
    target = next(target for target in TARGETS if target.name == "avx512vnni")
    module, _ = engine.kernel_module(emit_encoder, torch.float32, (target, spec), False)
    b = engine.binding()
    machine = b.Target.from_triple("x86_64-linux-gnu").create_target_machine(
        cpu="sapphirerapids", opt=3
    )
    code = machine.emit_assembly(engine.machine_code(module, machine))
    assert "tdpbssd" in code and "tilerelease" in code


@pytest.mark.parametrize("family", ["bert", "nomic_bert", "qwen3"])
def test_activations_of_24_bits_equal_float32(family):
    if not available(family):
        pytest.skip(f"transformers has no {family}")
    model = quantized(family)
    compiled = CompiledEncoder(read_encoder(model), "mean", False, "float32")
    assert prove(compiled, model) < 1e-5
    rows = texts((1, 17, compiled.plan.longest))
    for row, embedding in zip(rows, compiled(rows)):
        want = expected(model, row)
        assert (embedding - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize(
    "precision, device, reason",
    [
        ("int4", "cpu", "one of float32, exact, int8"),
        (None, "cpu", "one of"),
        ("int8", "meta", "for CPUs"),
    ],
)
def test_a_precision_that_cannot_be(precision, device, reason):
    with pytest.raises(ConfigError, match=reason):
        check_precision(precision, torch.device(device))


def test_a_prompt_is_left_out_of_the_mean(bert):
    model, compiled = bert
    row = texts([12])[0]
    ids = torch.tensor([row])
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state[0, 4:].mean(0)
    assert F.cosine_similarity(compiled([row], prompt_tokens=4)[0], want, dim=0) > 0.9999


def test_a_decoder_that_embeds_through_its_encoder():
    """Its tokenizer pads on the left, and the last token counts: packed texts have no padding."""
    heads = [Pooling(("lasttoken",)), Normalize()]
    encoder = Encoder(quantized("qwen3"), make_tokenizer("left"), heads)
    assert encoder.compiled
    words = ["the cat sleeps", "old stone", "a quick red dog runs over the river and not under it"]
    found = encoder.encode(words)
    for word, embedding in zip(words, found):
        ids = torch.tensor([encoder.tokenizer(word)["input_ids"]])
        want = encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        assert (embedding - want).norm() < 2e-4


def test_ids_and_lengths_that_cannot_be(bert):
    _, compiled = bert
    for rows in ([[]], [[96]], [[-1]], texts([compiled.plan.longest + 1])):
        with pytest.raises(ValueError):
            compiled(rows)


def test_what_is_not_read_says_why():
    model = tiny("bert", SIZES)
    with pytest.raises(NotReadable, match="not quantized"):
        read_encoder(model)
    with pytest.raises(NotReadable, match="training"):
        read_encoder(quantized("bert").train())
    if not hasattr(AutoConfig.for_model("qwen3"), "rope_parameters"):
        return  # older releases read other names
    factors = dict(
        short_factor=[1.0] * 16, long_factor=[2.0] * 16, original_max_position_embeddings=64
    )
    with pytest.raises(NotReadable, match="depend on the length"):
        read_encoder(
            quantized(
                "qwen3", rope_parameters=dict(rope_type="longrope", rope_theta=1e4, **factors)
            )
        )
    with pytest.raises(NotReadable, match="attention is not"):
        read_encoder(quantized("olmo2", num_key_value_heads=4))


def test_small_weights_do_not_blur_what_reads_what():
    """Where blocks add little, what enters and leaves their parts is nearly equal."""
    model = tiny("modernbert", SIZES | FAMILIES["modernbert"])
    needs_visible_queries(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        elif "embed" not in name:
            parameter.data *= 0.02
    plan = read_encoder(with_packed_blocks(model))
    assert all(block.pre_norm and block.gated for block in plan.blocks)


def test_a_program_that_is_wrong_is_refused(bert):
    model, _ = bert
    compiled = CompiledEncoder(read_encoder(model), "mean", False)
    other = quantized("bert")
    other.embeddings.LayerNorm.weight.data *= 1.5
    with pytest.raises(NotReadable, match="differs"):
        prove(compiled, other)


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= usable_cores() <= torch.multiprocessing.cpu_count()
