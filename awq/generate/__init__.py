"""Fused generation: any decoder whose structure is found and proven runs on a few fused kernels per block.

`build_decoder(model, max_seq_len)` reads the structure (`observe`, `trace`, `structure`), proves it (`build`) and gives a
`FusedDecoder` (`decoder`, `block`, `operations`, `cache`); `loop` puts it inside transformers' own `generate`.
`static` captures transformers' own step for models that are not fused.
"""

from awq.generate.build import build_decoder
from awq.generate.decoder import FusedDecoder
from awq.generate.plan import NotFusable
from awq.generate.static import StaticDecoder, build_static

__all__ = ["FusedDecoder", "NotFusable", "StaticDecoder", "build_decoder", "build_static"]
