"""AutoAWQ's three linear classes; each is a `WQLinear` of one format."""

from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.modules.linear.gemv_fast import WQLinear_GEMVFast

__all__ = ["WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_GEMVFast"]
