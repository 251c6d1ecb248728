"""AutoAWQ's import paths and signatures, as other software uses them."""

import importlib

import pytest
import torch
import zoo
from torch import nn
from transformers import AutoModelForCausalLM

from awq import AutoAWQForCausalLM, AwqConfig
from awq.core.weight import round_to_nearest
from awq.errors import AwqError, ConfigError, ModelError
from awq.models.base import BaseAWQForCausalLM
from awq.modules.act import ScaledActivation
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from awq.modules.linear.gemm import WQLinear_GEMM as gemm_module
from awq.modules.linear.gemv import WQLinear_GEMV as gemv_module
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast as gemv_fast_module
from awq.nn.linear import WQLinear
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.module import get_named_linears, set_op_by_name
from awq.utils.packing_utils import dequantize_gemm
from awq.utils.utils import clear_memory, get_best_device

QUANT = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
CLASSES = [WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast]


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64, bias=bias)


@pytest.mark.parametrize("cls", CLASSES)
def test_from_linear_equals_round_to_nearest(cls):
    dense = linear()
    weight = round_to_nearest(dense.weight.data, 32)
    # AutoAWQ hands gemm its scales transposed and the others not; here both tables are square-free,
    # so both are understood.
    for scales, zeros in ((weight.scales, weight.zeros), (weight.scales.t(), weight.zeros.t())):
        packed = cls.from_linear(dense, 4, 32, scales=scales.float(), zeros=zeros.float())
        assert torch.equal(packed.dequantize(), weight.dequantize())
    x = torch.randn(5, 64)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, weight.dequantize(), dense.bias))
    assert packed(x).dim() == 2, "a 2-D input comes back 2-D"


def test_square_scales_of_gemm_are_transposed():
    """As many groups as rows: AutoAWQ's gemm convention [groups, out] decides."""
    torch.manual_seed(1)
    dense = nn.Linear(128, 8)
    weight = round_to_nearest(dense.weight.data, 16)
    packed = WQLinear_GEMM.from_linear(dense, 4, 16, False, weight.scales.t(), weight.zeros.t())
    assert torch.equal(packed.dequantize(), weight.dequantize())


def test_empty_linear_has_the_names_and_shapes_of_the_files():
    packed = WQLinear_GEMM.from_linear(linear(), 4, 32, init_only=True)
    assert {k: tuple(v.shape) for k, v in packed.state_dict().items()} == {
        "qweight": (64, 8),
        "qzeros": (2, 8),
        "scales": (2, 64),
        "bias": (64,),
    }
    assert (packed.w_bit, packed.group_size, packed.in_features, packed.out_features) == (
        4,
        32,
        64,
        64,
    )
    with pytest.raises(ConfigError, match="4 bits"):
        WQLinear_GEMM(8, 32, 64, 64, False, "cpu")


def test_isinstance_sees_every_linear_of_the_format():
    packed = WQLinear.from_quantized(round_to_nearest(linear().weight.data, 32), None, "gemm")
    assert isinstance(packed, gemm_module) and not isinstance(
        packed, (gemv_module, gemv_fast_module)
    )
    assert not isinstance(linear(), gemm_module)


def test_dequantize_gemm_is_the_dense_weight():
    weight = round_to_nearest(linear().weight.data, 32)
    packed = WQLinear.from_quantized(weight, None, "gemm")
    dense = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32)
    assert dense.dtype == torch.float16 and torch.equal(dense.t(), weight.dequantize(torch.float16))


def test_helpers():
    holder = nn.Sequential(nn.Sequential(linear()), nn.ReLU())
    assert list(get_named_linears(holder)) == ["0.0"]
    set_op_by_name(holder, "0.0", nn.Identity())
    assert isinstance(holder[0][0], nn.Identity)
    clear_memory()
    assert torch.device(get_best_device())
    act = ScaledActivation(nn.ReLU(), torch.tensor([2.0, 4.0]))
    assert torch.equal(act(torch.tensor([[[2.0, -1.0]]])), torch.tensor([[[1.0, 0.0]]]))


def test_quantizer_class(llama_dir, texts):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    quantizer = AwqQuantizer(
        model, model.model, None, 4, 16, True, "GEMM", texts, duo_scaling=True, max_calib_samples=8
    )
    weight = torch.randn(8, 32)
    nearest, scales, zeros = quantizer.pseudo_quantize_tensor(weight)
    assert (nearest - weight).abs().max() <= scales.max() and scales.shape == zeros.shape == (8, 2)
    assert quantizer.quantize().linears and model.is_quantized


def test_wrapper_is_the_transformers_model(llama_dir, texts):
    model = AutoAWQForCausalLM.from_pretrained(
        str(llama_dir), torch_dtype="bfloat16", low_cpu_mem_usage=True, use_cache=False
    )
    assert isinstance(model, BaseAWQForCausalLM) and isinstance(model, nn.Module)
    assert (
        model.dtype == torch.bfloat16
        and model.device.type == "cpu"
        and model.config is model.model.config
    )
    assert model.get_input_embeddings() is model.model.get_input_embeddings()
    assert len(list(model.parameters())) == len(list(model.model.parameters()))
    assert model.eval() is model and model.to("cpu") is model
    assert model.tokenizer is not None, "loaded when asked for"
    with pytest.raises(AttributeError):
        model.no_such_thing  # noqa: B018
    with pytest.raises(ConfigError, match="not quantized"):
        model.save_quantized("anywhere")


@pytest.mark.parametrize(
    "kind", ["texts", "ids", "tensor", "tokenizer output", "tokenizer", "nothing"]
)
def test_first_argument_of_quantize(kind, llama_dir, texts, tokenizer):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir), dtype=torch.float32)
    ids = [tokenizer(t, return_tensors="pt").input_ids for t in texts[:8]]
    output = tokenizer(texts[:8], padding=True, return_tensors="pt")
    first = {
        "texts": texts[:8],
        "ids": ids,
        "tensor": output.input_ids,
        "tokenizer output": output,
        "tokenizer": tokenizer,
    }
    report = model.quantize(
        first.get(kind),
        quant_config=QUANT,
        calib_data=texts[:8],
        apply_clip=False,
        preset="fast",
        n_parallel_calib_samples=4,
        max_calib_seq_len=32,
        max_chunk_memory=1 << 20,
        quantizer_cls=AwqQuantizer,
    )
    assert report is model.report and len(report.linears) == 21 and report.tokens
    with pytest.raises(ConfigError, match="quantized already"):
        model.quantize(tokenizer)


def test_a_quantizer_of_ones_own_is_refused(llama_dir, bert_dir, texts):
    class Own(AwqQuantizer):
        def quantize(self):
            raise AssertionError

    for place in (llama_dir, bert_dir):
        model = AutoAWQForCausalLM.from_pretrained(str(place))
        with pytest.raises(ConfigError, match="quantizer_cls is Own"):
            model.quantize(calib_data=texts, quant_config=QUANT, quantizer_cls=Own)
        assert not model.is_quantized


@pytest.mark.parametrize(
    ("name", "said_now"),
    [
        ("gguf_compatible", "export_compatible"),
        ("n_samples", "max_calib_samples"),
        ("seqlen", "max_calib_seq_len"),
        ("mse_range", "apply_clip"),
        ("modules_to_not_convert", "quant_config="),
    ],
)
def test_older_names_say_what_they_are_called_now(name, said_now, llama_dir):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    with pytest.raises(ConfigError, match=f"{name}; say {said_now}"):
        model.quantize(**{name: 1})


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("awq.evaluation.eval_utils", "awq eval"),
        ("awq.models.qwen2vl", "AutoAWQForCausalLM"),
        ("awq.modules.fused.attn", "fuse_layers=True"),
        ("awq.modules.linear.exllama", "by device"),
        ("awq.utils.calib_data", "load_calibration"),
        ("awq.utils.qwen_vl_utils", "processor"),
    ],
)
def test_modules_without_a_counterpart_say_what_to_use(name, instead):
    with pytest.raises(ModuleNotFoundError, match=instead) as refused:
        importlib.import_module(name)
    assert refused.value.name.startswith("awq.") and "\n" not in str(refused.value)


def test_a_module_that_nobody_had_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="No module named 'awq.nothing'$"):
        importlib.import_module("awq.nothing")


def test_arguments_of_the_download(llama_dir):
    """AutoAWQ gave them to `snapshot_download`, which chooses files; here transformers does."""
    chosen = {"ignore_patterns": "*.bin", "max_workers": 2, "local_files_only": True}
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir), download_kwargs=chosen)
    assert model.processor is None, "of text alone"
    with pytest.raises(AwqError, match="patterns"):
        AutoAWQForCausalLM.from_pretrained(str(llama_dir), download_kwargs={"patterns": "*"})


def test_clip_has_two_names(llama_dir, texts):
    """AutoAWQ's argument, and the field of `QuantizeOptions`."""
    packed = []
    for spelled in ({"apply_clip": False}, {"clip": False}, {}):
        model = AutoAWQForCausalLM.from_pretrained(str(llama_dir), dtype=torch.float32)
        model.quantize(calib_data=texts[:8], quant_config=QUANT, preset="fast", **spelled)
        packed.append(model.model.model.layers[1].mlp.up_proj.qweight)
    assert torch.equal(packed[0], packed[1]) and not torch.equal(packed[0], packed[2])


def test_export_compatible_then_pack_is_exact(llama_dir, texts, tmp_path):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    model.quantize(calib_data=texts, quant_config=QUANT, export_compatible=True)
    assert not any(isinstance(m, WQLinear) for m in model.modules())
    inputs = zoo.token_batch()
    dense = zoo.outputs(model, **inputs)
    model.save_quantized(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config") and torch.equal(
        zoo.outputs(plain, **inputs), dense
    )
    model.pack()
    torch.testing.assert_close(zoo.outputs(model, **inputs), dense)
    model.save_quantized(tmp_path / "packed")
    loaded = AutoAWQForCausalLM.from_quantized(str(tmp_path / "packed"), device="cpu")
    assert torch.equal(zoo.outputs(loaded, **inputs), zoo.outputs(model, **inputs))


def test_quant_config_object_and_dict_are_the_same():
    assert AwqConfig.from_dict(QUANT) == AwqConfig(group_size=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q_group_size": 7}, "group_size"),
        ({"q_group_size": 20}, "20"),
        ({"version": "marlin9"}, "marlin9"),
        ({"w_bit": 8}, "4 bits"),
        ({"bit": 4}, "'bit'"),
    ],
)
def test_bad_settings_leave_the_model_alone(settings, message, llama_dir, texts):
    model = AutoAWQForCausalLM.from_pretrained(str(llama_dir))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        model.quantize(calib_data=texts, quant_config={**QUANT, **settings})
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and not model.is_quantized


def test_wrong_doors(llama_dir, tmp_path):
    with pytest.raises(ConfigError, match="from_pretrained"):
        AutoAWQForCausalLM.from_quantized(str(llama_dir))
    with pytest.raises(ModelError, match="does not exist"):
        AutoAWQForCausalLM.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="torch_dtype"):
        AutoAWQForCausalLM.from_pretrained(str(llama_dir), torch_dtype="float17")
    with pytest.raises(OSError, match="from_pretrained"):
        AutoAWQForCausalLM()


def test_an_encoder_does_not_generate(bert_dir):
    model = AutoAWQForCausalLM.from_pretrained(str(bert_dir))
    assert model(**zoo.token_batch()).last_hidden_state.dim() == 3
    with pytest.raises(ConfigError, match="no language model"):
        model.generate(torch.ones(1, 2, dtype=torch.long))
