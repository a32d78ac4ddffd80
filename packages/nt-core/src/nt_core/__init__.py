"""Covariance propagation through infinitely wide neural networks.

The pieces: `Kernel`, the covariances themselves; `steps` and `Program`, what a network does to them, as data;
`propagate`, which executes a program on the best backend there is; `layer` and its kin, which make layers of them;
`batch` and `KernelStore`, for kernels of any size.
"""

from nt_core import activations, steps
from nt_core.backends import Backend, Request, propagate, register_backend
from nt_core.batch import batch
from nt_core.compare import Comparison, Difference, compare
from nt_core.explain import explain
from nt_core.kernel import Kernel
from nt_core.layer import layer, make_kernel_fn, rules_of, supports_masking
from nt_core.masks import MaskedArray, unmask_fn
from nt_core.program import Builder, Node, Program, Value
from nt_core.requirements import Bool, Diagonal, requires
from nt_core.rules import Rule, Run, apply_rules, step_rule
from nt_core.sources import Inputs
from nt_core.spec import Spec
from nt_core.store import KernelStore

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Bool",
    "Builder",
    "Comparison",
    "Diagonal",
    "Difference",
    "Inputs",
    "Kernel",
    "KernelStore",
    "MaskedArray",
    "Node",
    "Program",
    "Request",
    "Rule",
    "Run",
    "Spec",
    "Value",
    "activations",
    "apply_rules",
    "batch",
    "compare",
    "explain",
    "layer",
    "make_kernel_fn",
    "propagate",
    "register_backend",
    "requires",
    "rules_of",
    "step_rule",
    "steps",
    "supports_masking",
    "unmask_fn",
]
