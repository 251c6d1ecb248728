"""`get_named_linears` and `set_op_by_name`."""

from awq.nn.surgery import named_linears as get_named_linears
from awq.nn.surgery import replace_module as set_op_by_name

__all__ = ["get_named_linears", "set_op_by_name"]
