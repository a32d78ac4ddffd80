"""Linear functions whose transposes are computed by other means."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nt_core.manual import varying, varying_axes

Vector = Any  # a pytree of arrays
Linear = Callable[[Any, Vector], Vector]  # from a point, and a vector at it in which it is linear


def linear_call(push: Linear, pull: Linear, reference_push: Linear, reference_pull: Linear) -> Linear:
    """Returns `push` with `pull` as its transpose, of which JAX never sees that it is.

    `jax.custom_derivatives.linear_call` does so too, but not under `vmap`, nor can it be differentiated with respect to
    the point. `lax.custom_linear_solve` can do both, with the solution given instead of found: for a linear map L from
    a space A to a space B, the map `U(a, b) = (a, b + L a)` has the inverse `(a, b - L a)`, and

        (x, y) -> (U^T y, U x)

    is symmetric. Solving with its inverse as the matrix is applying it: on `((a, 0), 0)` it gives L a, its transpose,
    which is itself, gives `L^T b`. Of the matrix nothing is ever used but its derivative with respect to the point, so
    its product with a vector is not computed.

    Args:
      push: returns L a.
      pull: returns L^T b.
      reference_push, reference_pull: the same, and differentiable with respect to the point.
    """

    @jax.custom_jvp
    def matrix(point: Any, solution: Vector) -> Vector:
        return solution

    @matrix.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        (point, solution), (point_tangent, solution_tangent) = primals, tangents

        def at(point: Any) -> Vector:
            return _unipotents(reference_push, reference_pull, -1, point, solution[::-1])[::-1]

        change = _dependent(jax.jvp(at, (point,), (point_tangent,))[1], point_tangent)
        return matrix(point, solution), jax.tree.map(jnp.add, matrix(point, solution_tangent), change)

    # Compiled, the half that nobody reads costs nothing; and JAX, which asks twice, traces it once.
    solve = jax.jit(partial(_unipotents, push, pull, 1))

    def call(point: Any, vector: Vector) -> Vector:
        # What is added up over the devices of a mesh is added up once, where these are made to vary.
        point, vector = varying((point, vector), varying_axes(point))
        image = jax.eval_shape(push, point, vector)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (vector, image))
        (_, (_, result)) = lax.custom_linear_solve(
            lambda solution: matrix(point, solution),
            _dependent(((vector, nothing[1]), nothing), vector),
            lambda _, right: solve(point, right),
            symmetric=True,
        )
        return result

    return call


def _dependent(x: Vector, vector: Vector) -> Vector:
    """Returns `x`, all of it linear in a vector: JAX transposes solutions for right sides of which no part is known."""
    anchor = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(vector))
    zero = jnp.where(False, anchor, jnp.zeros_like(anchor))  # its transpose is 0 for infinite cotangents too
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), x)


def _unipotents(push: Linear, pull: Linear, sign: int, point: Any, vectors: Vector) -> Vector:
    """Returns `(U^T y, U x)` for `vectors = (x, y)`; with `sign` -1 of the inverse of U."""
    (a1, b1), (a2, b2) = vectors

    def add(x: Vector, y: Vector) -> Vector:
        return jax.tree.map(lambda x, y: x + sign * y, x, y)

    upper = (add(a2, pull(point, b2)), b2)
    lower = (a1, add(b1, push(point, a1)))
    return upper, lower
