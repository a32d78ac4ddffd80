"""Activations: what a nonlinearity does to the covariance of Gaussian pre-activations."""

from nt_core.activations.base import Activation, activation, static
from nt_core.activations.elementwise import Elementwise, ElementwiseNumerical
from nt_core.activations.erf import Erf, Gelu
from nt_core.activations.exponential import Exp, Rbf, Sin
from nt_core.activations.relu import ABRelu

__all__ = [
    "ABRelu",
    "Activation",
    "Elementwise",
    "ElementwiseNumerical",
    "Erf",
    "Exp",
    "Gelu",
    "Rbf",
    "Sin",
    "activation",
    "static",
]
