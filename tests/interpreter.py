"""What the interpreters of some Triton releases do otherwise than a GPU, put right; import this
before the kernels run.

- Triton 3.6 takes no loop bound that was loaded: numpy 2.4 no longer makes an int of an array of
one element.
- Triton 3.6 rounds a fused multiply-add twice, as `x * y + z`. A GPU rounds it once, and newer
  interpreters do too. The kernels of the searches divide with it (`search._divided`), and a
  quotient that is off by one bit can turn a code.
"""

import numpy as np
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_too(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _fma(self, x, y, z):
    """Rounded once: float64 holds the product of two float32 exactly."""
    wide = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)


interpreter._patch_lang_tensor = _patch_too
interpreter.InterpreterBuilder.create_fma = _fma
