"""`WQLinear_GEMM`."""

from awq.modules.linear.compat import CompatLinear


class WQLinear_GEMM(CompatLinear):
    """A 4-bit linear in the gemm format."""

    version = "gemm"
    scales_first_axis = "groups"
