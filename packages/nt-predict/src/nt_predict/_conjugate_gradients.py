"""Preconditioned conjugate gradients for several right-hand sides, which share each product with the matrix."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Map = Callable[[np.ndarray], np.ndarray]

# A curvature this far below zero, relative to the matrix, is no rounding error of a kernel.
_INDEFINITE = 1e-4


class Solution(NamedTuple):
    """What conjugate gradients ended with.

    Attributes:
      x: (n, columns).
      residuals: (columns,), norms of `b - A x`, computed as it stands, relative to those of b.
      status: `'converged'`, `'stagnated'` or `'out of passes'`.
    """

    x: np.ndarray
    residuals: np.ndarray
    status: str


def conjugate_gradients(multiply: Map, precondition: Map, b: np.ndarray, rtol: float, max_passes: int) -> Solution:
    """Solves `A x = b`, for b (n, columns).

    The recursion's residual drifts away from the true one. When it claims convergence, the true one is computed, and
    the recursion starts again from there if it is too large.

    Args:
      multiply: `v -> A v`, a pass over the matrix.
      precondition: `v -> P^-1 v`.
      b: right-hand sides.
      rtol: the relative residual of every column to reach.
      max_passes: how many products with A there may be, those for true residuals included.

    Raises:
      LinAlgError: (a `ValueError`) A has a negative eigenvalue.
    """
    scales = np.linalg.norm(b, axis=0)
    scales[scales == 0] = 1
    x, residual, passes = np.zeros_like(b), b, 0
    reached = np.linalg.norm(residual, axis=0) / scales
    while (reached > rtol).any():
        allowed = max_passes - passes - 1
        if allowed < 1:
            return Solution(x, reached, "out of passes")
        change, used = _recursion(multiply, precondition, residual, rtol * scales, allowed)
        passes += used + 1
        proposal = x + change
        residual_there = b - multiply(proposal)
        there = np.linalg.norm(residual_there, axis=0) / scales
        stagnated = (there > rtol) & (there > reached / 2)
        better = there < reached
        x, residual = np.where(better, proposal, x), np.where(better, residual_there, residual)
        reached = np.minimum(there, reached)
        if stagnated.any() and used < allowed:
            return Solution(x, reached, "stagnated")
    return Solution(x, reached, "converged")


def _recursion(
    multiply: Map, precondition: Map, b: np.ndarray, goals: np.ndarray, max_passes: int
) -> tuple[np.ndarray, int]:
    """Returns x with residuals that the recursion believes to be below the goals, and how many passes it took."""
    x, residual = np.zeros_like(b), b.copy()
    direction = z = precondition(residual)
    product = (residual * z).sum(0)
    active = np.linalg.norm(residual, axis=0) > goals
    for used in range(max_passes):
        if not active.any():
            return x, used
        image = multiply(direction)
        curvature = (direction * image).sum(0)
        _check(curvature, direction, image)
        active &= curvature > 0
        step = np.where(active, product, 0) / np.where(active, curvature, 1)
        x += step * direction
        residual -= step * image
        active &= np.linalg.norm(residual, axis=0) > goals
        z = precondition(residual)
        previous, product = product, (residual * z).sum(0)
        direction = z + np.where(active, product, 0) / np.where(active, previous, 1) * direction
    return x, max_passes


def _check(curvature: np.ndarray, direction: np.ndarray, image: np.ndarray) -> None:
    lengths = np.linalg.norm(direction, axis=0) * np.linalg.norm(image, axis=0)
    if (curvature < -_INDEFINITE * lengths).any():
        lowest = float((curvature / np.maximum((direction**2).sum(0), np.finfo(float).tiny)).min())
        raise np.linalg.LinAlgError(
            f"The train-train kernel is not positive semi-definite: it has an eigenvalue of at most {lowest:.3g}. "
            "Increase `diag_reg`."
        )
