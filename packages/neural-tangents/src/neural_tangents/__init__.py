"""Infinitely wide neural networks as kernels, in JAX.

`stax` builds networks, `predict` draws conclusions from their kernels; the functions here, and more of them in
`empirical`, deal with finite networks.
"""

from importlib.metadata import version

from nt_core import Kernel, KernelStore, batch
from nt_empirical import (
    NtkImplementation,
    empirical_kernel_fn,
    empirical_nngp_fn,
    empirical_ntk_diagonal_fn,
    empirical_ntk_fn,
    empirical_ntk_vp_fn,
    linearize,
    monte_carlo_kernel_fn,
    ntk_operator,
    taylor_expand,
)

from neural_tangents import _src as _src
from neural_tangents import empirical, predict, stax

__version__ = version("neural-tangents")

__all__ = [
    "Kernel",
    "KernelStore",
    "NtkImplementation",
    "batch",
    "empirical",
    "empirical_kernel_fn",
    "empirical_nngp_fn",
    "empirical_ntk_diagonal_fn",
    "empirical_ntk_fn",
    "empirical_ntk_vp_fn",
    "linearize",
    "monte_carlo_kernel_fn",
    "ntk_operator",
    "predict",
    "stax",
    "taylor_expand",
]
