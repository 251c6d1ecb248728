"""Generates with vLLM, which reads `GEMM` directories without this package (`pip install vllm`).

    python examples/vllm_generate.py DIRECTORY "Where are you?"

As a server with OpenAI's interface: `vllm serve DIRECTORY`.
"""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()

    model = LLM(model=arguments.directory)
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    for prompt, found in zip(arguments.prompts, model.generate(arguments.prompts, greedy)):
        print(f"{prompt} → {found.outputs[0].text}")


if __name__ == "__main__":
    main()
