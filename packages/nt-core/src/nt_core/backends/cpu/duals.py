"""The coefficients of nonlinearities, as the classes of csrc/duals_*.h expect them."""

import math
from typing import Any

import jax.numpy as jnp

from nt_core.activations import (
    ABRelu,
    Activation,
    Clip,
    ClipGate,
    ElementwiseNumerical,
    Erf,
    Exp,
    ExpNormalized,
    Gabor,
    Gaussian,
    Gelu,
    Rbf,
    RectifiedMonomial,
    Sin,
    Step,
)
from nt_core.activations.coefficients import TracedFunction
from nt_core.activations.hermite import Expansion, Series, power
from nt_core.activations.tables import CoefficientTable, coefficient_table
from nt_core.backends.base import Refused
from nt_core.backends.cpu import native


def encode_activation(activation: Activation, precision: str) -> tuple[list[int], list[Any]]:
    """What programs say of an activation, and its coefficients, as the classes of csrc/duals_*.h expect them.

    Args:
      activation: the activation.
      precision: the name of the type that is computed in.

    Returns:
      Its number, and the shape of its table if it has one; and the coefficients: numbers, which may be traced, or
      the array of the table.
    """
    shape: list[int] = []
    match activation:
        case ABRelu(a, b):
            name, coefficients = "AbRelu", [(a * a + b * b) / 2, (a - b) * (a - b) / 2]
        case Erf(a, b, c):
            name, coefficients = "Erf", [a * a * (2 / math.pi), 2 * b * b, c * c]
        case Gelu():
            name, coefficients = "Gelu", []
        case Sin(a, b, c):
            name = "Sin"
            coefficients = [a * a / 2, b * b, jnp.cos(2 * c), 2 * jnp.cos(c) ** 2, jnp.sin(c) ** 2]
        case Rbf(gamma):
            name, coefficients = "Rbf", [2 * gamma]
        case Exp(a, b):
            name, coefficients = "Exp", [a * a, b * b]
        case ExpNormalized(gamma, shift):
            name, coefficients = "ExpNormalized", [gamma, jnp.exp(gamma * (1 + shift))]
        case Step(a, b, c):
            name = "Step"
            coefficients = [(a - b) * (a - b) / 2, (a * a + b * b) / 4, c * c / 2, (a + b) / 2, c]
        case Gaussian(a, b):
            name, coefficients = "Gaussian", [a * a, -2 * b]
        case Gabor():
            name, coefficients = "Gabor", []
        case Clip(a, low, high, c):
            name, coefficients = "Clip", [a * a, 2 * a * c, c * c, -low, high]
        case ClipGate(a, bound, c):
            name, coefficients = "ClipGate", [c * c, a * a, bound]
        case Series():
            name, coefficients = "Polynomial", _table(activation.expansion())
        case RectifiedMonomial(degree):
            name, coefficients = "RectifiedMonomial", _table(power(degree))
        case ElementwiseNumerical():
            name, (numbers, *shape) = "Tabulated", _coefficient_table(activation, precision)
            coefficients = [numbers]
        case _:
            raise Refused(f"the dual of {type(activation).__name__} is not native")
    return [native.schema()["activations"][name], *shape], coefficients


def _coefficient_table(activation: ElementwiseNumerical, precision: str) -> CoefficientTable:
    try:
        return coefficient_table(activation, precision)
    except TracedFunction as error:
        raise Refused("the function of ElementwiseNumerical depends on values that are traced") from error


def _table(expansion: Expansion) -> list[Any]:
    """The coefficients of all `p_l`, row after row. What is not there is zero."""
    degree = max((l + 2 * i for l, i in expansion), default=0)
    largest = native.schema()["max_degree"]
    if degree > largest:
        raise Refused(f"the dual of a polynomial of degree {degree}, it takes those of up to {largest}")
    return [expansion.get((l, i), 0.0) for l in range(largest + 1) for i in range(largest // 2 + 1)]
