"""`WQLinear_GEMVFast`."""

from awq.modules.linear.compat import CompatLinear


class WQLinear_GEMVFast(CompatLinear):
    """A 4-bit linear in the gemv_fast format."""

    version = "gemv_fast"
