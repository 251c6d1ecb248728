"""One engine of `cpu.py models` in a process of its own: writes random models, or prints speed and
memory as one line of JSON.

    python benchmarks/cpu_models.py write-awq | write-dense | write-gguf | write-genai | awq | …
    directory shape

The parts of llama.cpp and AutoAWQ import nothing of this package, so that they run in environments
of their own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROMPT, NEW, REPEATS = 32, 32, 5


class Shape(NamedTuple):
    """A Llama; tied: the head is the embedding."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tinyllama-1.1b": Shape(22, 2048, 5632, 32, 4, 32000, False),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128256, True),
}


def llama_config(shape: Shape) -> dict[str, int | bool]:
    """Arguments of transformers' LlamaConfig."""
    return dict(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        max_position_embeddings=2048,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )


def resident() -> dict[str, float]:
    """Resident memory of this process in GB: all of it, what is not in files, and the most there
    was."""
    names = {"VmRSS": "resident_gb", "RssAnon": "anonymous_gb", "VmHWM": "peak_gb"}
    lines = (
        line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    return {
        names[words[0][:-1]]: int(words[1]) * 1024 / 1e9
        for words in lines
        if words and words[0][:-1] in names
    }


def measure(
    prefill: Callable[[], object],
    whole: Callable[[], object],
    new: int = NEW,
    repeats: int = REPEATS,
    warm: int = 2,
) -> dict:
    """prefill: prompt to first token; whole: prompt and `new` tokens more. Medians over repeats,
    the first `warm` not counted."""
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(repeats + warm):
        start = time.perf_counter()
        prefill()
        middle = time.perf_counter()
        whole()
        end = time.perf_counter()
        times["prefill"].append(middle - start)
        times["decode"].append((end - middle) - (middle - start))
    first, rest = (statistics.median(times[name][warm:]) for name in ("prefill", "decode"))
    best = [min(times[name][warm:]) for name in ("prefill", "decode")]
    return {
        "prefill_tok_s": PROMPT / first,
        "decode_tok_s": new / rest,
        "best_prefill_tok_s": PROMPT / best[0],
        "best_decode_tok_s": new / best[1],
    }


def transformers_model(folder: Path, kind: str, shape: Shape) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from awq import AutoAWQForCausalLM
    from awq.kernels import cpu, use_backend

    dense = kind.startswith("transformers")
    if not dense:
        cpu.problem(torch.bfloat16, 2)  # LLVM's own memory does not belong to the model
    before, start = resident(), time.perf_counter()
    if dense:
        model = AutoModelForCausalLM.from_pretrained(
            folder / "dense", dtype=getattr(torch, kind.split()[1])
        )
    else:
        model = AutoAWQForCausalLM.from_quantized(
            str(folder / "awq"), fuse_layers=True, device="cpu", max_seq_len=512
        )
        if kind == "awq 4-bit head":
            model.fuse_layers(512, 1, True)
    load = time.perf_counter() - start
    ids = torch.randint(
        3, shape.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)
    )
    new = lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)  # noqa: E731
    start = time.perf_counter()
    new(2)
    first = time.perf_counter() - start
    with use_backend("cpu_int8" if kind == "awq int8" else None):
        found = measure(lambda: new(1), lambda: new(1 + NEW))
    after = resident()
    grown = {
        f"model_{name}": after[name] - before[name] for name in ("resident_gb", "anonymous_gb")
    }
    return found | {"load_s": load, "first_s": first} | after | grown


def llama(folder: Path, shape: Shape) -> dict[str, float]:
    import llama_cpp

    before, start = resident(), time.perf_counter()
    model = llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False
    )
    load, ids = (
        time.perf_counter() - start,
        [3 + (i * 7919) % (shape.vocabulary - 3) for i in range(PROMPT)],
    )

    def new(count: int) -> None:
        model.reset()
        model.eval(ids)
        for i in range(count):
            model.eval([100 + i])

    found = measure(lambda: new(0), lambda: new(NEW))
    after = resident()
    return (
        found
        | {"load_s": load}
        | after
        | {"model_resident_gb": after["resident_gb"] - before["resident_gb"]}
    )


def genai(folder: Path, shape: Shape) -> dict[str, float]:
    import onnxruntime_genai

    before, start = resident(), time.perf_counter()
    model = onnxruntime_genai.Model(str(folder / "genai"))
    load, ids = (
        time.perf_counter() - start,
        [3 + (i * 7919) % (shape.vocabulary - 3) for i in range(PROMPT)],
    )

    def new(count: int) -> None:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(
            max_length=PROMPT + count, min_length=PROMPT + count, do_sample=False
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids)
        for _ in range(count):
            generator.generate_next_token()

    found = measure(lambda: new(1), lambda: new(1 + NEW))
    after = resident()
    return (
        found
        | {"load_s": load}
        | after
        | {"model_resident_gb": after["resident_gb"] - before["resident_gb"]}
    )


def autoawq(shape: Shape) -> dict[str, float]:
    """AutoAWQ's linears as they compute on a CPU without its extensions: a dense float16 weight
    made anew in every call.

    Its `from_quantized` insists on intel-extension-for-pytorch there, which is archived. Two tokens
    only: they take long.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from awq.modules.linear.gemm import WQLinear_GEMM

    config = LlamaConfig(**llama_config(shape))
    before, start = resident(), time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else parameter.data.normal_(0, 0.02)
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                packed = WQLinear_GEMM.from_linear(linear, 4, 128, init_only=True)
                packed.qweight.random_(-(2**31), 2**31 - 1)
                packed.scales.fill_(0.02 / 4.6)
                block.get_submodule(name.rpartition(".")[0]).__setattr__(
                    name.rpartition(".")[2], packed
                )
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    load, ids = time.perf_counter() - start, torch.arange(3, 3 + PROMPT).view(1, -1)

    def new(count: int) -> None:
        with torch.no_grad():
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    found = measure(lambda: new(1), lambda: new(2), 1, 1, 0)
    after = resident()
    return (
        found
        | {"load_s": load}
        | after
        | {"model_resident_gb": after["resident_gb"] - before["resident_gb"]}
    )


def write_genai(folder: Path) -> None:
    """onnxruntime-genai's own builder, int4 as it does it for a CPU. It insists on a tokenizer; any
    will do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<2>", bos_token="<1>"
    ).save_pretrained(folder / "dense")
    builder = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        folder / "cache",
    ]
    options = ["--extra_options", "int4_accuracy_level=4"]
    subprocess.run([*builder, "-i", folder / "dense", "-o", folder / "genai", *options], check=True)


def write_model(folder: Path, quantized: bool, shape: Shape) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    from awq.checkpoint.save import save_checkpoint
    from awq.config import AwqConfig
    from awq.core.weight import QuantizedWeight
    from awq.nn.linear import WQLinear
    from awq.nn.surgery import linear_shape, named_linears, replace_module

    config = LlamaConfig(**llama_config(shape))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else parameter.data.normal_(0, 0.02)
    if shape.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if not quantized:
        model.save_pretrained(folder / "dense")
        return
    for name, linear in named_linears(model).items():
        if name != "lm_head":
            inputs, outputs = linear_shape(linear)
            zeros = torch.randint(6, 10, (outputs, inputs // 128), dtype=torch.uint8)
            scales = torch.full(zeros.shape, 0.02 / 4.6, dtype=torch.float16)
            codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
            replace_module(
                model, name, WQLinear.from_quantized(QuantizedWeight(codes, scales, zeros))
            )
    save_checkpoint(model, folder / "awq", AwqConfig(group_size=128))


def write_gguf(path: Path, shape: Shape) -> None:
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    random, writer = numpy.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        [b"<unk>", b"<s>", b"</s>", *(f"<{i}>".encode() for i in range(3, shape.vocabulary))]
    )
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (shape.vocabulary - 3))

    def add(name: str, rows: int, columns: int) -> None:
        blocks = numpy.empty((rows * columns // 32, 18), numpy.uint8)
        blocks[:, :2] = numpy.array([0.02 / 4.6], numpy.float16).view(numpy.uint8)
        blocks[:, 2:] = random.integers(0, 256, (len(blocks), 16), dtype=numpy.uint8)
        writer.add_tensor(
            f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0
        )

    add("token_embd", shape.vocabulary, shape.width)
    add("output", shape.vocabulary, shape.width)
    writer.add_tensor("output_norm.weight", numpy.ones(shape.width, numpy.float32))
    shared = shape.width // shape.heads * shape.kv_heads
    width, hidden = shape.width, shape.hidden
    sizes = {
        "attn_q": (width, width),
        "attn_k": (shared, width),
        "attn_v": (shared, width),
        "attn_output": (width, width),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", numpy.ones(shape.width, numpy.float32))
        for name, size in sizes.items():
            add(f"blk.{layer}.{name}", *size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    kind, folder, shape = sys.argv[1], Path(sys.argv[2]), SHAPES[sys.argv[3]]
    if kind == "write-gguf":
        write_gguf(folder / "model.gguf", shape)
    elif kind == "write-genai":
        write_genai(folder)
    elif kind.startswith("write-"):
        write_model(folder, kind == "write-awq", shape)
    elif kind == "llama.cpp":
        print(json.dumps(llama(folder, shape)))
    elif kind == "onnxruntime-genai":
        print(json.dumps(genai(folder, shape)))
    elif kind == "autoawq":
        print(json.dumps(autoawq(shape)))
    else:
        print(json.dumps(transformers_model(folder, kind, shape)))


if __name__ == "__main__":
    main()
