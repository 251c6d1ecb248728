"""`WQLinear_GEMV`."""

from awq.modules.linear.compat import CompatLinear


class WQLinear_GEMV(CompatLinear):
    """A 4-bit linear in the gemv format."""

    version = "gemv"
