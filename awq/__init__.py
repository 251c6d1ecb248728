"""AWQ: 4-bit activation-aware weight quantization of language and embedding models (arXiv
2306.00978).

Names are imported when first used: `import awq` loads no torch. It does register this package as
transformers' loader for AWQ checkpoints (`awq.unregister()` undoes it).
"""

from typing import TYPE_CHECKING

from awq import _gone, _register
from awq._lazy import lazy_names

if TYPE_CHECKING:
    from awq.calibration import clean_texts as clean_texts
    from awq.calibration import load_calibration as load_calibration
    from awq.calibration import prepare_calibration_tokens as prepare_calibration_tokens
    from awq.checkpoint.hf import register as register
    from awq.checkpoint.hf import unregister as unregister
    from awq.config import AwqConfig as AwqConfig
    from awq.embed.encoder import Encoder as Encoder
    from awq.models.auto import AutoAWQForCausalLM as AutoAWQForCausalLM
    from awq.models.auto import AutoAWQForEmbedding as AutoAWQForEmbedding
    from awq.models.planning import plan_quantization as plan_quantization
    from awq.models.streaming import quantize_directory as quantize_directory
    from awq.models.streaming import resume_quantization as resume_quantization
    from awq.native.encoder import NativeEncoder as NativeEncoder
    from awq.quantize import QuantizeOptions as QuantizeOptions
    from awq.quantize import QuantReport as QuantReport
    from awq.quantize import quantize_model as quantize_model

__version__ = "0.3.0"

_HOME = {
    "AutoAWQForCausalLM": "awq.models.auto",
    "AutoAWQForEmbedding": "awq.models.auto",
    "AwqConfig": "awq.config",
    "Encoder": "awq.embed.encoder",
    "NativeEncoder": "awq.native.encoder",
    "QuantReport": "awq.quantize",
    "QuantizeOptions": "awq.quantize",
    "clean_texts": "awq.calibration",
    "load_calibration": "awq.calibration",
    "plan_quantization": "awq.models.planning",
    "prepare_calibration_tokens": "awq.calibration",
    "quantize_directory": "awq.models.streaming",
    "quantize_model": "awq.quantize",
    "register": "awq.checkpoint.hf",
    "resume_quantization": "awq.models.streaming",
    "unregister": "awq.checkpoint.hf",
}

__all__ = [*_HOME]

__getattr__ = lazy_names(__name__, _HOME)

_register.install()
_gone.install()
