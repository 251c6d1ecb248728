"""Saving, loading and converting checkpoints; transformers' own machinery does the work wherever it
can.

Names are imported when first used, so that `awq info` can look into files without torch.
"""

from typing import TYPE_CHECKING

from awq._lazy import lazy_names

if TYPE_CHECKING:
    from awq.checkpoint.convert import convert_checkpoint as convert_checkpoint
    from awq.checkpoint.hub import push_directory as push_directory
    from awq.checkpoint.load import load_model as load_model
    from awq.checkpoint.save import save_checkpoint as save_checkpoint

_HOME = {
    "convert_checkpoint": "awq.checkpoint.convert",
    "push_directory": "awq.checkpoint.hub",
    "load_model": "awq.checkpoint.load",
    "save_checkpoint": "awq.checkpoint.save",
}

__all__ = [*_HOME]

__getattr__ = lazy_names(__name__, _HOME)
