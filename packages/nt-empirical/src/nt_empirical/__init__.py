"""Linearisation and empirical kernels of finite neural networks."""

from nt_empirical._diagonal import empirical_ntk_diagonal_fn
from nt_empirical._expansion import linearize, taylor_expand
from nt_empirical._explain import explain_ntk
from nt_empirical._frameworks import from_equinox, from_haiku, from_linen, from_nnx
from nt_empirical._kernel import empirical_kernel_fn
from nt_empirical._monte_carlo import monte_carlo_kernel_fn
from nt_empirical._nngp import empirical_nngp_fn
from nt_empirical._ntk import NtkImplementation, empirical_ntk_fn, empirical_ntk_vp_fn
from nt_empirical._operator import Eigenpairs, Estimate, NTKOperator, ntk_operator

__version__ = "0.1.0"

__all__ = [
    "Eigenpairs",
    "Estimate",
    "NTKOperator",
    "NtkImplementation",
    "empirical_kernel_fn",
    "empirical_nngp_fn",
    "empirical_ntk_diagonal_fn",
    "empirical_ntk_fn",
    "empirical_ntk_vp_fn",
    "explain_ntk",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "linearize",
    "monte_carlo_kernel_fn",
    "ntk_operator",
    "taylor_expand",
]
