"""A matrix, and its transpose, times vectors, in double precision: what iterative solvers do with tiles of a kernel."""

import jax
import jax.numpy as jnp
from jax import Array

from nt_core.backends.cpu import native

_TARGET = "nt_products"
# Rows that are in double precision at a time: in the cache of a CPU.
_ROWS = 256


def products(matrix: Array, right: Array, left: Array) -> tuple[Array, Array]:
    """Returns `matrix @ right` and `matrix.T @ left` in double precision, which must be enabled; on CPU natively.

    It is not differentiable.

    Args:
      matrix: `(rows, columns)`, in single or double precision.
      right: `(columns, n)`, in double precision.
      left: `(rows, n)`, likewise.

    Raises:
      ValueError: sizes do not match.
      TypeError: vectors are not in double precision.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nt_core.products import products
      >>> with jax.enable_x64(True):
      ...     direct, transposed = products(jnp.array([[1.0, 2.0]]), jnp.ones((2, 1)), jnp.ones((1, 1)))
      >>> print(direct, transposed.T)
      [[3.]] [[1. 2.]]
    """
    matrix, right, left = (jnp.asarray(array) for array in (matrix, right, left))
    shapes = matrix.shape, right.shape, left.shape
    if any(len(shape) != 2 for shape in shapes) or shapes[1:] != tuple((n, right.shape[1]) for n in matrix.shape[::-1]):
        raise ValueError(
            f"A matrix of shape (m, n) takes vectors of shapes (n, k) and (m, k), got {', '.join(map(str, shapes))}."
        )
    if right.dtype != jnp.float64 or left.dtype != jnp.float64:
        raise TypeError(
            f"Vectors should be in double precision, got {right.dtype} and {left.dtype}: see jax.enable_x64."
        )
    if native.refusal() is None and matrix.dtype in (jnp.float32, jnp.float64) and matrix.size and right.size:
        return jax.lax.platform_dependent(matrix, right, left, cpu=_natively, default=_by_xla)
    return _by_xla(matrix, right, left)


def _natively(matrix: Array, right: Array, left: Array) -> tuple[Array, Array]:
    results = [jax.ShapeDtypeStruct(vectors.shape, vectors.dtype) for vectors in (left, right)]
    direct, transposed = jax.ffi.ffi_call(_TARGET, results, vmap_method="sequential")(matrix, right, left)
    return direct, transposed


def _by_xla(matrix: Array, right: Array, left: Array) -> tuple[Array, Array]:
    direct = [jnp.zeros((0, right.shape[1]), right.dtype)]
    transposed = jnp.zeros((left.shape[1], matrix.shape[1]), right.dtype)
    for start in range(0, len(matrix), _ROWS):
        rows = matrix[start : start + _ROWS].astype(right.dtype)
        direct.append(rows @ right)
        transposed += left[start : start + _ROWS].T @ rows
    return jnp.concatenate(direct), transposed.T
