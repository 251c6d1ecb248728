"""One engine of `cpu.py models` in a process of its own: writes random models, or prints speed and memory as one line of JSON.

    python benchmarks/cpu_models.py write-awq | write-dense | write-gguf | awq | … directory

llama.cpp's part imports nothing but llama_cpp, so that it runs in another environment.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
PROMPT, NEW, REPEATS = 32, 32, 5


def resident() -> dict[str, float]:
    """Resident memory of this process in GB: all of it, what is not in files, and the most there was."""
    names = {"VmRSS": "resident_gb", "RssAnon": "anonymous_gb", "VmHWM": "peak_gb"}
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {names[words[0][:-1]]: int(words[1]) * 1024 / 1e9 for words in lines if words and words[0][:-1] in names}


def measure(prefill: Callable[[], object], whole: Callable[[], object]) -> dict[str, float]:
    """prefill: prompt to first token; whole: prompt and NEW tokens more. Medians over repeats, the first two not counted."""
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        prefill()
        middle = time.perf_counter()
        whole()
        end = time.perf_counter()
        times["prefill"].append(middle - start)
        times["decode"].append((end - middle) - (middle - start))
    first, rest = (statistics.median(times[name][2:]) for name in ("prefill", "decode"))
    best = [min(times[name][2:]) for name in ("prefill", "decode")]
    return {"prefill_tok_s": PROMPT / first, "decode_tok_s": NEW / rest, "best_prefill_tok_s": PROMPT / best[0],
            "best_decode_tok_s": NEW / best[1]}  # fmt: skip


def transformers_model(folder: Path, kind: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from awq import AutoAWQForCausalLM
    from awq.kernels import cpu, use_backend

    if kind != "transformers bfloat16":
        cpu.problem(torch.bfloat16, 2)  # LLVM's own memory does not belong to the model
    before, start = resident(), time.perf_counter()
    if kind == "transformers bfloat16":
        model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    else:
        model = AutoAWQForCausalLM.from_quantized(str(folder / "awq"), fuse_layers=True, device="cpu", max_seq_len=512)
        if kind == "awq 4-bit head":
            model.fuse_layers(512, 1, True)
    load = time.perf_counter() - start
    ids = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    new = lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)  # noqa: E731
    start = time.perf_counter()
    new(2)
    first = time.perf_counter() - start
    with use_backend("cpu_int8" if kind == "awq int8" else None):
        found = measure(lambda: new(1), lambda: new(1 + NEW))
    after = resident()
    grown = {f"model_{name}": after[name] - before[name] for name in ("resident_gb", "anonymous_gb")}
    return found | {"load_s": load, "first_s": first} | after | grown


def llama(folder: Path) -> dict[str, float]:
    import llama_cpp

    before, start = resident(), time.perf_counter()
    model = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
    load, ids = time.perf_counter() - start, [3 + (i * 7919) % (VOCABULARY - 3) for i in range(PROMPT)]

    def new(count: int) -> None:
        model.reset()
        model.eval(ids)
        for i in range(count):
            model.eval([100 + i])

    found = measure(lambda: new(0), lambda: new(NEW))
    after = resident()
    return found | {"load_s": load} | after | {"model_resident_gb": after["resident_gb"] - before["resident_gb"]}


def write_model(folder: Path, quantized: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    from awq.checkpoint.save import save_checkpoint
    from awq.config import AwqConfig
    from awq.core.weight import QuantizedWeight
    from awq.nn.linear import WQLinear
    from awq.nn.surgery import linear_shape, named_linears, replace_module

    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                         num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY, max_position_embeddings=2048)  # fmt: skip
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else parameter.data.normal_(0, 0.02)
    if not quantized:
        model.save_pretrained(folder / "dense")
        return
    for name, linear in named_linears(model).items():
        if name != "lm_head":
            inputs, outputs = linear_shape(linear)
            zeros = torch.randint(6, 10, (outputs, inputs // 128), dtype=torch.uint8)
            scales = torch.full(zeros.shape, 0.02 / 4.6, dtype=torch.float16)
            codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
            replace_module(model, name, WQLinear.from_quantized(QuantizedWeight(codes, scales, zeros)))
    save_checkpoint(model, folder / "awq", AwqConfig(group_size=128))


def write_gguf(path: Path) -> None:
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    random, writer = numpy.random.default_rng(0), GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(2)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<{i}>".encode() for i in range(3, VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))

    def add(name: str, rows: int, columns: int) -> None:
        blocks = numpy.empty((rows * columns // 32, 18), numpy.uint8)
        blocks[:, :2] = numpy.array([0.02 / 4.6], numpy.float16).view(numpy.uint8)
        blocks[:, 2:] = random.integers(0, 256, (len(blocks), 16), dtype=numpy.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0)

    add("token_embd", VOCABULARY, WIDTH)
    add("output", VOCABULARY, WIDTH)
    writer.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    shared = WIDTH // HEADS * KV_HEADS
    sizes = {"attn_q": (WIDTH, WIDTH), "attn_k": (shared, WIDTH), "attn_v": (shared, WIDTH), "attn_output": (WIDTH, WIDTH),
             "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}  # fmt: skip
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", numpy.ones(WIDTH, numpy.float32))
        for name, size in sizes.items():
            add(f"blk.{layer}.{name}", *size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind == "write-gguf":
        write_gguf(folder / "model.gguf")
    elif kind.startswith("write-"):
        write_model(folder, kind == "write-awq")
    elif kind == "llama.cpp":
        print(json.dumps(llama(folder)))
    else:
        print(json.dumps(transformers_model(folder, kind)))


if __name__ == "__main__":
    main()
