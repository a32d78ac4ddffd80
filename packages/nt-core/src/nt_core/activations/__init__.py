"""Activations: what a nonlinearity does to the covariance of Gaussian pre-activations."""

from nt_core.activations.base import Activation, activation, static
from nt_core.activations.clip import Clip
from nt_core.activations.clip_gate import ClipGate
from nt_core.activations.elementwise import Elementwise
from nt_core.activations.erf import Erf, Gelu
from nt_core.activations.exponential import Exp, ExpNormalized, Rbf, Sin
from nt_core.activations.gaussian import Gabor, Gaussian
from nt_core.activations.hermite import Hermite, Monomial, Polynomial
from nt_core.activations.numerical import ElementwiseNumerical
from nt_core.activations.rectified import RectifiedMonomial, Step
from nt_core.activations.relu import ABRelu

__all__ = [
    "ABRelu",
    "Activation",
    "Clip",
    "ClipGate",
    "Elementwise",
    "ElementwiseNumerical",
    "Erf",
    "Exp",
    "ExpNormalized",
    "Gabor",
    "Gaussian",
    "Gelu",
    "Hermite",
    "Monomial",
    "Polynomial",
    "Rbf",
    "RectifiedMonomial",
    "Sin",
    "Step",
    "activation",
    "static",
]
