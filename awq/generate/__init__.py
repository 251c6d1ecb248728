"""Fused generation: any decoder whose structure is found and proven runs on a few fused kernels per
block.

There is no table of architectures. A model is handled in three rooms, one after the other:

- `read`: what is it? Skeleton passes tell what surrounds the blocks (`model`), traces of a block on
  random numbers tell what the block does (`trace`, `channels`, `norms`, `block`). The answer is a
  `plan`: plain frozen data.
- `prove`: is that true? Every block is compared with transformers' own in float32, at the first and
  at the last positions, as a prompt and as a step, and the whole model with its own logits. What is
  not proven keeps transformers' loop (`NotFusable`).
- `run`: carry it out. Fused blocks over a cache (`block`, `operations`, `projection`, `cache`),
  prompts and steps (`decoder`, `graph`), inside transformers' own `generate` (`request`, `loop`).
  `static` captures transformers' step where nothing is fused.
"""

from awq.generate.plan import NotFusable
from awq.generate.prove import build_decoder
from awq.generate.prove_static import build_static
from awq.generate.run.decoder import FusedDecoder
from awq.generate.run.static import StaticDecoder

__all__ = ["FusedDecoder", "NotFusable", "StaticDecoder", "build_decoder", "build_static"]
