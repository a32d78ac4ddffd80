"""Programs as backends read them: lowered to few primitives, with the form of every value."""

from nt_core.lowering.lowered import Form, Lowered, LoweredNode, is_same_position, lower, windows_of
from nt_core.lowering.primitives import Pairs, Primitive, Variances
from nt_core.lowering.repeats import Repeated, fold_repeats
from nt_core.lowering.windows import Window, Windows

__all__ = [
    "Form",
    "Lowered",
    "LoweredNode",
    "Pairs",
    "Primitive",
    "Repeated",
    "Variances",
    "Window",
    "Windows",
    "fold_repeats",
    "is_same_position",
    "lower",
    "windows_of",
]
