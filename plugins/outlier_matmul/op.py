"""Everything about ``qpipe.OutlierMatMul`` in one place to import from: contract, packing, reference, body, choice."""

from .contract import (
    DOMAIN,
    INPUTS,
    MAX_NEW_OUTLIERS,
    OP_TYPE,
    OUTPUTS,
    PADDING,
    VERSION,
    X_TYPES,
    Packed,
    RowCodes,
    pack,
    padded,
    quantize_rows,
    reference,
)
from .function import function_proto
from .select import ABSOLUTE_THRESHOLD, DEFAULT_CAP, Selection, select_outliers

__all__ = [
    "ABSOLUTE_THRESHOLD",
    "DEFAULT_CAP",
    "DOMAIN",
    "INPUTS",
    "MAX_NEW_OUTLIERS",
    "OP_TYPE",
    "OUTPUTS",
    "PADDING",
    "VERSION",
    "X_TYPES",
    "Packed",
    "RowCodes",
    "Selection",
    "function_proto",
    "pack",
    "padded",
    "quantize_rows",
    "reference",
    "select_outliers",
]
